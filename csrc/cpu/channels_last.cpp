// Channels last: a vector holds neighbouring channels of a window, and its taps lie in the tensor
// itself.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
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
  const auto larger = [](Vec a, Vec b) MMSOFTPOOL_INLINE_LAMBDA { return a > b ? a : b; };
  Vec max = S::splat(std::numeric_limits<float>::lowest());
  for (int64_t w = 0; w < (2 * n + 1) * step; w += step) {
    max = larger(S::load(r0 + w), larger(S::load(r1 + w), larger(S::load(r2 + w), max)));
    __builtin_prefetch(r0 + w + 4 * n * step);
    __builtin_prefetch(r1 + w + 4 * n * step);
    __builtin_prefetch(r2 + w + 4 * n * step);
  }
  const Vec floor = exponents.floor * ((127.0f + weight_scale) / 127);
  const auto weight = [&](Vec x) MMSOFTPOOL_INLINE_LAMBDA {
    return S::template exp2<weight_scale>(exponents.log2e_alpha * larger(floor, x - max));
  };
  const auto column = [&](int64_t i) MMSOFTPOOL_INLINE_LAMBDA {
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
    const auto mean = [&](const Column<S>& column) MMSOFTPOOL_INLINE_LAMBDA {
      return column.sum * (column.largest - top) + column.mean;
    };
    const Vec sum = left.sum + middle.sum + last.sum;
    const Vec y = top + (mean(left) + mean(middle) + mean(last)) / sum;
    S::store(y, output + i * step + c);
    wrong |= S::is_below(sum, std::ldexp(smallest_sum, weight_scale)) |
             S::is_beyond(y, std::numeric_limits<float>::max());
  }
  return wrong;
}

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<Compute<T>, Bytes>;
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const int64_t depth = pooling.depth.out, height = pooling.height.out;
  const int64_t channels = pooling.channels, vectors = channels / S::lanes * S::lanes;
  Pointers<const T> rows, taps;
  rows.reserve(pooling.depth.kernel_size * pooling.height.kernel_size);
  taps.reserve(pooling.taps());
  for (int64_t row = begin; row < end; ++row) {
    const T* const image = input + row / height / depth * pooling.in_plane() * channels;
    rows.clear();
    for_each_row(
        pooling, row / height % depth, row % height,
        [&](int64_t d, int64_t h) MMSOFTPOOL_INLINE_LAMBDA {
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
        for_each_column(pooling.width, ow, [&](int64_t w) MMSOFTPOOL_INLINE_LAMBDA {
          taps.push_back(input_row + w * channels);
        });
      }
      with_taps(taps.size(), [&](auto constant) MMSOFTPOOL_INLINE_LAMBDA {
        const T* const* const tap = taps.data();
        int64_t c = first_channel;
        if constexpr (constant.value == 0) {
          using Vectors = std::make_index_sequence<Bytes == 64 ? 4 : 2>;
          constexpr int64_t block = Vectors::size() * S::lanes;
          for (; c + block <= channels; c += block) {
            window_outputs<0, S>(
                Vectors(), taps.size(), exponents,
                [&](int64_t t, int64_t i)
                    MMSOFTPOOL_INLINE_LAMBDA { return S::load(tap[t] + c + i * S::lanes); },
                [&](int64_t i, auto y)
                    MMSOFTPOOL_INLINE_LAMBDA { S::store(y, pixel + c + i * S::lanes); });
          }
        }
        for (; c + S::lanes <= channels; c += S::lanes) {
          window_outputs<constant.value, S>(
              OneVector(), taps.size(), exponents,
              [&](int64_t t, int64_t) MMSOFTPOOL_INLINE_LAMBDA { return S::load(tap[t] + c); },
              [&](int64_t, Vec y) MMSOFTPOOL_INLINE_LAMBDA { S::store(y, pixel + c); });
        }
        if (const int64_t rest = channels - c; rest > 0) {
          window_outputs<0, S>(
              OneVector(), taps.size(), exponents,
              [&](int64_t t, int64_t)
                  MMSOFTPOOL_INLINE_LAMBDA { return S::load_first(tap[t] + c, rest); },
              [&](int64_t, Vec y) MMSOFTPOOL_INLINE_LAMBDA { S::store_first(y, pixel + c, rest); });
        }
      });
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
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const int64_t channels = pooling.channels;
  const int64_t blocks = (channels + channel_block - 1) / channel_block;
  // Gradients are summed in grad_input itself if it has the type computed with, else in
  // gradient_rows.
  constexpr bool in_place = std::is_same_v<T, A>;
  const int64_t step = in_place ? channels : channel_block;  // from a pixel's sums to the next's
  GradientRows<A> gradient_rows(pooling, in_place ? 0 : pooling.width.in * channel_block);
  Pointers<const T> rows, taps;
  Pointers<A> sum_rows, grads;  // as the rows and the taps, where the sums are
  // Vectors of channels taken at once, for windows of many taps: no more channels than the smallest
  // channel_block, so that the rounding does not depend on the number of threads.
  using Vectors = std::make_index_sequence<Bytes == 64 ? 1 : 2>;
  std::vector<A> scratch(pooling.taps() * Vectors::size() * S::lanes);
  // Whether no input is in two windows, and whether each is in one. Then there is nothing to add
  // to.
  const auto all_axes = [&](auto&& is) {
    return is(pooling.depth) && is(pooling.height) && is(pooling.width);
  };
  const bool disjoint =
      all_axes([](const Axis& axis) { return axis.stride >= axis.span() || axis.out == 1; });
  const bool covered =
      disjoint && pooling.taps() != 9 && all_axes([](const Axis& axis) {
        return axis.padding == 0 && axis.dilation == 1 && axis.out * axis.kernel_size == axis.in;
      });

  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks;
    const int64_t first_channel = item % blocks * channel_block;
    const int64_t width = std::min(channel_block, channels - first_channel);
    const int64_t image_start = n * pooling.in_plane() * channels + first_channel;
    const T* const image = input + image_start;
    const T* const grad_image = grad_output + n * pooling.out_plane() * channels + first_channel;
    const auto grad_row = [&](int64_t d, int64_t h) MMSOFTPOOL_INLINE_LAMBDA {
      return grad_input + image_start + (d * pooling.height.in + h) * pooling.width.in * channels;
    };

    const auto add_pixel = [&](const T* grad_pixel) MMSOFTPOOL_INLINE_LAMBDA {
      with_taps(taps.size(), [&](auto constant) MMSOFTPOOL_INLINE_LAMBDA {
        int64_t c = 0;
        // A branch for each of nine taps would not pay.
        const bool add_to_sums = constant.value == 9 || !disjoint;
        const auto add = [&](int64_t t, int64_t, Vec v) MMSOFTPOOL_INLINE_LAMBDA {
          S::store(add_to_sums ? S::load(grads[t] + c) + v : v, grads[t] + c);
        };
        if constexpr (constant.value == 0) {
          constexpr int64_t block = Vectors::size() * S::lanes;
          for (; c + block <= width; c += block) {
            window_gradients<0, S>(
                Vectors(), taps.size(), exponents, pooling.gradient,
                [&](int64_t i)
                    MMSOFTPOOL_INLINE_LAMBDA { return S::load(grad_pixel + c + i * S::lanes); },
                scratch.data(),
                [&](int64_t t, int64_t i)
                    MMSOFTPOOL_INLINE_LAMBDA { return S::load(taps[t] + c + i * S::lanes); },
                [&](int64_t t, int64_t i, Vec v) MMSOFTPOOL_INLINE_LAMBDA {
                  A* const sum = grads[t] + c + i * S::lanes;
                  S::store(add_to_sums ? S::load(sum) + v : v, sum);
                });
          }
        }
        for (; c + S::lanes <= width; c += S::lanes) {
          window_gradients<constant.value, S>(
              OneVector(), taps.size(), exponents, pooling.gradient,
              [&](int64_t) MMSOFTPOOL_INLINE_LAMBDA { return S::load(grad_pixel + c); },
              scratch.data(),
              [&](int64_t t, int64_t) MMSOFTPOOL_INLINE_LAMBDA { return S::load(taps[t] + c); },
              add);
        }
        if (const int64_t rest = width - c; rest > 0) {
          window_gradients<0, S>(
              OneVector(), taps.size(), exponents, pooling.gradient,
              [&](int64_t) MMSOFTPOOL_INLINE_LAMBDA { return S::load_first(grad_pixel + c, rest); },
              scratch.data(),
              [&](int64_t t, int64_t)
                  MMSOFTPOOL_INLINE_LAMBDA { return S::load_first(taps[t] + c, rest); },
              [&](int64_t t, int64_t, Vec v) MMSOFTPOOL_INLINE_LAMBDA {
                S::store_first(
                    add_to_sums ? S::load_first(grads[t] + c, rest) + v : v, grads[t] + c, rest);
              });
        }
      });
    };
    const auto add_row = [&](int64_t od, int64_t oh) MMSOFTPOOL_INLINE_LAMBDA {
      rows.clear();
      sum_rows.clear();
      for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) MMSOFTPOOL_INLINE_LAMBDA {
        rows.push_back(image + (d * pooling.height.in + h) * pooling.width.in * channels);
        if constexpr (in_place) {
          sum_rows.push_back(grad_row(d, h));
        } else {
          sum_rows.push_back(gradient_rows.claim(item, d, h));
        }
      });
      for (int64_t ow = 0; ow < pooling.width.out; ++ow) {
        taps.clear();
        grads.clear();
        for (size_t r = 0; r < rows.size(); ++r) {
          for_each_column(pooling.width, ow, [&](int64_t w) MMSOFTPOOL_INLINE_LAMBDA {
            taps.push_back(rows[r] + w * channels);
            grads.push_back(sum_rows[r] + w * step);
          });
        }
        const int64_t pixel = (od * pooling.height.out + oh) * pooling.width.out + ow;
        add_pixel(grad_image + pixel * channels);
      }
    };
    const auto write_row = [&](int64_t d, int64_t h, A* sums) MMSOFTPOOL_INLINE_LAMBDA {
      T* const row = grad_row(d, h);
      for (int64_t w = 0; w < pooling.width.in; ++w) {
        for (int64_t c = 0; c < width; c += S::lanes) {
          A* const sum = sums != nullptr ? sums + w * channel_block + c : nullptr;
          const Vec v = sum != nullptr ? S::load(sum) : Vec{};
          if (width - c >= S::lanes) {
            S::store(v, row + w * channels + c);
          } else {
            S::store_first(v, row + w * channels + c, width - c);
          }
          if (sum != nullptr) {
            S::store(Vec{}, sum);
          }
        }
      }
    };
    if constexpr (in_place) {
      // Rows are set to 0 when the first windows reach them, so that they are in the cache.
      int64_t cleared = covered ? pooling.depth.in * pooling.height.in : 0;
      const auto clear_until = [&](int64_t end) MMSOFTPOOL_INLINE_LAMBDA {
        for (; cleared < end; ++cleared) {
          write_row(cleared / pooling.height.in, cleared % pooling.height.in, nullptr);
        }
      };
      const auto last_reached = [](const Axis& axis, int64_t o) MMSOFTPOOL_INLINE_LAMBDA {
        return std::min(axis.first_input(o) + axis.span(), axis.in) - 1;
      };
      for (int64_t od = 0; od < pooling.depth.out; ++od) {
        for (int64_t oh = 0; oh < pooling.height.out; ++oh) {
          const int64_t d = last_reached(pooling.depth, od), h = last_reached(pooling.height, oh);
          clear_until(d * pooling.height.in + h + 1);
          add_row(od, oh);
        }
      }
      clear_until(pooling.depth.in * pooling.height.in);
    } else {
      gradient_rows.for_each_output_row(item, add_row, write_row);
    }
  }
}

}  // namespace

MMSOFTPOOL_DEFINE_KERNEL(channels_last)
MMSOFTPOOL_INSTANTIATE_KERNEL(channels_last, float)
MMSOFTPOOL_INSTANTIATE_KERNEL(channels_last, double)
MMSOFTPOOL_INSTANTIATE_KERNEL(channels_last, Half)
MMSOFTPOOL_INSTANTIATE_KERNEL(channels_last, BFloat16)

}  // namespace mmsoftpool::cpu
