// Channels last: a vector holds neighbouring channels of a window, and its taps lie in the tensor
// itself.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "rows.h"
#include "softmax.h"

namespace mmsoftpool::cpu {
namespace {

// Windows of 3 x 3 at stride 2 share every other column. So many of them are computed together.
constexpr int64_t most_neighbours = 4;

// How many windows from ow on pool_neighbours() takes: at least two, without padding, or none.
int64_t neighbours(const Axis& width, size_t rows, int64_t ow) {
  const int64_t first = width.first_input(ow);
  if (rows != 3 || width.kernel_size != 3 || width.stride != 2 || width.dilation != 1 ||
      first < 0) {
    return 0;
  }
  const int64_t n =
      std::min<int64_t>({(width.in - first - 1) / 2, width.out - ow, most_neighbours});
  return n >= 2 ? n : 0;
}

// Weights relative to one maximum for all windows. A window far below it has small weights; to
// leave room for their products with small numbers, they are scaled by a power of two, which
// cancels in mean / sum.
constexpr int weight_scale = 60;

// The sums of a column of three taps x with weights w: of w, and of w (x - largest). The outputs
// must be as right as the window's own taps allow: relative to the common maximum, max + mean / sum
// would cancel.
template <typename S>
struct Column {
  typename S::Vec largest, sum, mean;
};

// The outputs of n such windows for a vector of channels. Returns the lanes that are wrong. row:
// where the first tap of each row is. step: from a column to the next, in input and output.
template <typename S, typename T>
MMSOFTPOOL_INLINE auto pool_neighbours(
    const Exponents<S>& exponents, const T* const* row, int64_t c, int64_t step, int64_t n,
    T* output) {
  using Vec = typename S::Vec;
  const T *const r0 = row[0] + c, *const r1 = row[1] + c, *const r2 = row[2] + c;
  const auto larger = [](Vec a, Vec b) INLINED { return a > b ? a : b; };
  Vec max = S::splat(std::numeric_limits<float>::lowest());
  for (int64_t w = 0; w < (2 * n + 1) * step; w += step) {
    max = larger(S::load(r0 + w), larger(S::load(r1 + w), larger(S::load(r2 + w), max)));
    __builtin_prefetch(r0 + w + 4 * n * step);
    __builtin_prefetch(r1 + w + 4 * n * step);
    __builtin_prefetch(r2 + w + 4 * n * step);
  }
  const Vec floor = exponents.floor * ((127.0f + weight_scale) / 127);
  const auto weight = [&](Vec x) INLINED {
    return S::template exp2<weight_scale>(exponents.log2e_alpha * larger(floor, x - max));
  };
  const auto column = [&](int64_t i) INLINED {
    const Vec x0 = S::load(r0 + i * step), x1 = S::load(r1 + i * step), x2 = S::load(r2 + i * step);
    const Vec w0 = weight(x0), w1 = weight(x1), w2 = weight(x2);
    const Vec top = larger(x0, larger(x1, x2));
    return Column<S>{top, w0 + w1 + w2, w0 * (x0 - top) + w1 * (x1 - top) + w2 * (x2 - top)};
  };
  Column<S> last = column(0);
  typename S::Bits wrong{};
  for (int64_t i = 0; i < n; ++i) {
    const Column<S> left = last, middle = column(2 * i + 1);
    last = column(2 * i + 2);
    const Vec top = larger(left.largest, larger(middle.largest, last.largest));
    const auto mean = [&](const Column<S>& column)
                          INLINED { return column.sum * (column.largest - top) + column.mean; };
    const Vec sum = left.sum + middle.sum + last.sum;
    const Vec y = top + (mean(left) + mean(middle) + mean(last)) / sum;
    S::store(y, output + i * step + c);
    wrong |= S::is_below(sum, std::ldexp(smallest_sum, weight_scale)) |
             S::is_beyond(y, std::numeric_limits<float>::max());
  }
  return wrong;
}

// Calls visit(taps, vectors, c, n) for the vectors of the channels [c, end), n lanes each: `Many`
// of them at once for windows of many taps, whose number K is not known when compiling. The last
// vector may have fewer lanes.
template <int K, typename S, typename Many, typename Visit>
MMSOFTPOOL_INLINE void for_each_vector(int64_t c, int64_t end, Visit&& visit) {
  const typename S::All all;
  const std::integral_constant<int, K> taps;
  if constexpr (K == 0) {
    constexpr int64_t block = Many::size() * S::lanes;
    for (; c + block <= end; c += block) {
      visit(taps, Many(), c, all);
    }
  }
  for (; c + S::lanes <= end; c += S::lanes) {
    visit(taps, OneVector(), c, all);
  }
  if (c < end) {
    visit(std::integral_constant<int, 0>(), OneVector(), c, end - c);
  }
}

// Pools the channels [first_channel, channels) of one window. taps: where they begin.
template <int Bytes, typename S, typename T>
MMSOFTPOOL_INLINE void pool_pixel(
    const Exponents<S>& exponents, const Pointers<const T>& taps, int64_t first_channel,
    int64_t channels, T* pixel) {
  using Many = std::make_index_sequence<Bytes == 64 ? 4 : 2>;
  const T* const* const tap = taps.data();
  with_taps(taps.size(), [&](auto constant) INLINED {
    for_each_vector<constant.value, S, Many>(
        first_channel, channels, [&](auto known, auto vectors, int64_t c, auto n) INLINED {
          window_outputs<known.value, S>(
              vectors, taps.size(), exponents,
              [&](int64_t t, int64_t i) INLINED { return S::load(tap[t] + c + i * S::lanes, n); },
              [&](int64_t i, auto y) INLINED { S::store(y, pixel + c + i * S::lanes, n); });
        });
  });
}

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<Compute<T>, Bytes>;
  const Exponents<S> exponents(pooling);
  const int64_t depth = pooling.depth.out, height = pooling.height.out;
  const int64_t channels = pooling.channels, vectors = channels / S::lanes * S::lanes;
  Pointers<const T> rows, taps;
  rows.reserve(pooling.depth.kernel_size * pooling.height.kernel_size);
  taps.reserve(pooling.taps());
  for (int64_t row = begin; row < end; ++row) {
    const T* const image = input + row / height / depth * pooling.in_plane() * channels;
    rows.clear();
    for_each_row(pooling, row / height % depth, row % height, [&](int64_t d, int64_t h) INLINED {
      rows.push_back(image + (d * pooling.height.in + h) * pooling.width.in * channels);
    });
    int64_t end = 0;  // of the windows that pool_neighbours() took
    bool pooled = false;
    for (int64_t ow = 0; ow < pooling.width.out; ++ow) {
      T* const pixel = output + (row * pooling.width.out + ow) * channels;
      if constexpr (!std::is_same_v<T, double>) {
        const int64_t n = ow < end ? 0 : neighbours(pooling.width, rows.size(), ow);
        if (n > 0 && vectors > 0 && pooling.alpha > 1e-9) {  // else products could overflow
          const T* first[3];
          for (int r = 0; r < 3; ++r) {
            first[r] = rows[r] + pooling.width.first_input(ow) * channels;
          }
          auto wrong = pool_neighbours<S>(exponents, first, 0, channels, n, pixel);
          for (int64_t c = S::lanes; c < vectors; c += S::lanes) {
            wrong |= pool_neighbours<S>(exponents, first, c, channels, n, pixel);
          }
          pooled = none_of(wrong);
          end = ow + n;
        }
      }
      const int64_t first_channel = ow < end && pooled ? vectors : 0;
      if (first_channel == channels) {
        continue;
      }
      taps.clear();
      for (const T* const input_row : rows) {
        for_each_column(pooling.width, ow, [&](int64_t w) INLINED {
          taps.push_back(input_row + w * channels);
        });
      }
      pool_pixel<Bytes>(exponents, taps, first_channel, channels, pixel);
    }
  }
}

// Vectors of channels that the backward takes at once: no more channels than the smallest
// channel_block, so that the rounding does not depend on the number of threads.
template <int Bytes>
using BackwardVectors = std::make_index_sequence<Bytes == 64 ? 1 : 2>;

// Adds the gradients of one window to `sums`, or sets those, for each of its taps. scratch: for
// BackwardVectors of every tap.
template <int Bytes, typename S, typename T, typename A>
MMSOFTPOOL_INLINE void add_gradients(
    const Exponents<S>& exponents, Gradient gradient, const Pointers<const T>& taps,
    const Pointers<A>& sums, bool set, const T* grad_output, int64_t channels, A* scratch) {
  const T* const* const tap = taps.data();
  A* const* const sum = sums.data();
  with_taps(taps.size(), [&](auto constant) INLINED {
    const bool add_to_sums = constant.value == 9 || !set;  // nine branches would not pay
    for_each_vector<constant.value, S, BackwardVectors<Bytes>>(
        0, channels, [&](auto known, auto vectors, int64_t c, auto n) INLINED {
          window_gradients<known.value, S>(
              vectors, taps.size(), exponents, gradient,
              [&](int64_t i) INLINED { return S::load(grad_output + c + i * S::lanes, n); },
              scratch,
              [&](int64_t t, int64_t i) INLINED { return S::load(tap[t] + c + i * S::lanes, n); },
              [&](int64_t t, int64_t i, auto v) INLINED {
                A* const to = sum[t] + c + i * S::lanes;
                S::store(add_to_sums ? S::load(to, n) + v : v, to, n);
              });
        });
  });
}

// Writes the sums of a row, with a pixel every sums_step, and sets them to 0; or 0 without sums.
template <typename S, typename T>
MMSOFTPOOL_INLINE void write_row(
    Compute<T>* sums, int64_t sums_step, T* row, int64_t step, int64_t width, int64_t channels) {
  for (int64_t w = 0; w < width; ++w) {
    for (int64_t c = 0; c < channels; c += S::lanes) {
      typename S::Vec v{};
      if (sums != nullptr) {
        v = S::load(sums + w * sums_step + c);
        S::store(typename S::Vec{}, sums + w * sums_step + c);
      }
      S::store(v, row + w * step + c, std::min(S::lanes, channels - c));
    }
  }
}

// Items are blocks of channels of one image.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using S = Simd<A, Bytes>;
  const Exponents<S> exponents(pooling);
  const Axis &depth = pooling.depth, &height = pooling.height, &width = pooling.width;
  const int64_t all_channels = pooling.channels;
  const int64_t blocks = (all_channels + channel_block - 1) / channel_block;
  // Gradients are summed in grad_input itself if it has the type computed with, else in
  // gradient_rows.
  constexpr bool in_place = std::is_same_v<T, A>;
  const int64_t sums_step = in_place ? all_channels : channel_block;  // from a pixel to the next
  GradientRows<A> gradient_rows(pooling, in_place ? 0 : width.in * channel_block);
  Pointers<const T> rows, taps;
  Pointers<A> sum_rows, sums;  // as the rows and the taps
  std::vector<A> scratch(pooling.taps() * BackwardVectors<Bytes>::size() * S::lanes);
  // Whether no input is in two windows, and whether each is in one. Then there is nothing to add
  // to.
  const auto all_axes = [&](auto&& is) { return is(depth) && is(height) && is(width); };
  const bool disjoint =
      all_axes([](const Axis& axis) { return axis.stride >= axis.span() || axis.out == 1; });
  const bool covered =
      disjoint && pooling.taps() != 9 && all_axes([](const Axis& axis) {
        return axis.padding == 0 && axis.dilation == 1 && axis.out * axis.kernel_size == axis.in;
      });

  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks, first_channel = item % blocks * channel_block;
    const int64_t channels = std::min(channel_block, all_channels - first_channel);
    const int64_t image_start = n * pooling.in_plane() * all_channels + first_channel;
    const T* grad_pixel = grad_output + n * pooling.out_plane() * all_channels + first_channel;
    const auto row_start = [&](int64_t d, int64_t h) INLINED {
      return image_start + (d * height.in + h) * width.in * all_channels;
    };
    const auto add_row = [&](int64_t od, int64_t oh) INLINED {
      rows.clear();
      sum_rows.clear();
      for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) INLINED {
        rows.push_back(input + row_start(d, h));
        if constexpr (in_place) {
          sum_rows.push_back(grad_input + row_start(d, h));
        } else {
          sum_rows.push_back(gradient_rows.claim(item, d, h));
        }
      });
      for (int64_t ow = 0; ow < width.out; ++ow) {
        taps.clear();
        sums.clear();
        for (size_t r = 0; r < rows.size(); ++r) {
          for_each_column(width, ow, [&](int64_t w) INLINED {
            taps.push_back(rows[r] + w * all_channels);
            sums.push_back(sum_rows[r] + w * sums_step);
          });
        }
        add_gradients<Bytes>(
            exponents, pooling.gradient, taps, sums, disjoint, grad_pixel, channels,
            scratch.data());
        grad_pixel += all_channels;
      }
    };
    const auto write = [&](int64_t d, int64_t h, A* sums) INLINED {
      write_row<S>(sums, sums_step, grad_input + row_start(d, h), all_channels, width.in, channels);
    };
    if constexpr (in_place) {
      // Rows are set to 0 when the first windows reach them, so that they are in the cache.
      int64_t cleared = covered ? depth.in * height.in : 0;
      const auto clear_until = [&](int64_t end) INLINED {
        for (; cleared < end; ++cleared) {
          write(cleared / height.in, cleared % height.in, nullptr);
        }
      };
      const auto last_reached = [](const Axis& axis, int64_t o) INLINED {
        return std::min(axis.first_input(o) + axis.span(), axis.in) - 1;
      };
      for (int64_t od = 0; od < depth.out; ++od) {
        for (int64_t oh = 0; oh < height.out; ++oh) {
          clear_until(last_reached(depth, od) * height.in + last_reached(height, oh) + 1);
          add_row(od, oh);
        }
      }
      clear_until(depth.in * height.in);
    } else {
      gradient_rows.for_each_output_row(item, add_row, write);
    }
  }
}

}  // namespace

MMSOFTPOOL_DEFINE_KERNEL(channels_last)
MMSOFTPOOL_INSTANTIATE_KERNEL(channels_last, double)

}  // namespace mmsoftpool::cpu
