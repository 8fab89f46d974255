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

// How many windows of a row from ow on are computed so: at least two, without padding, or none.
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
constexpr float least_exponent = -127 - weight_scale;  // of 2, for a weight of 0

// The sums of a column of three taps x with weights w: of w, and of w (x - largest). The outputs
// must be as right as the window's own taps allow: relative to the common maximum, max + mean / sum
// would cancel.
template <typename S>
struct Column {
  typename S::Vec largest, sum, mean;
};

template <typename S>
MMSOFTPOOL_INLINE Column<S> sum_column(const typename S::Vec* x, const typename S::Vec* w) {
  typename S::Vec top = x[1] > x[2] ? x[1] : x[2];
  top = x[0] > top ? x[0] : top;
  return {top, w[0] + w[1] + w[2], w[0] * (x[0] - top) + w[1] * (x[1] - top) + w[2] * (x[2] - top)};
}

// A window: its output is top + below.
template <typename S>
struct WindowSums {
  typename S::Vec top, below, sum;
};

template <typename S>
MMSOFTPOOL_INLINE WindowSums<S> sum_window(
    const Column<S>& left, const Column<S>& middle, const Column<S>& right) {
  typename S::Vec top = middle.largest > right.largest ? middle.largest : right.largest;
  top = left.largest > top ? left.largest : top;
  const auto mean = [&](const Column<S>& column)
                        INLINED { return column.sum * (column.largest - top) + column.mean; };
  const typename S::Vec sum = left.sum + middle.sum + right.sum;
  return {top, (mean(left) + mean(middle) + mean(right)) / sum, sum};
}

// The lanes in which a window may be wrong. Far below the maximum, products that are not fused lose
// the digits of weights.
template <typename S>
MMSOFTPOOL_INLINE auto is_wrong(const WindowSums<S>& window) {
  constexpr float least = S::has_fused ? smallest_sum : 0x1p-24f;
  return S::is_below(window.sum, std::ldexp(least, weight_scale)) |
         S::is_beyond(window.top + window.below, std::numeric_limits<float>::max());
}

// Calls use(i, window) for n such windows and a vector of channels; weight(i, t, x) gives the
// weight of tap t of column i. row: where the first tap of each row is. step: from a column to the
// next.
template <typename S, typename T, typename Weight, typename Use>
MMSOFTPOOL_INLINE void for_each_neighbour(
    const T* const* row, int64_t step, int64_t n, Weight&& weight, Use&& use) {
  const auto column = [&](int64_t i) INLINED {
    typename S::Vec x[3], w[3];
    for (int t = 0; t < 3; ++t) {
      x[t] = S::load(row[t] + i * step);
      w[t] = weight(i, t, x[t]);
    }
    return sum_column<S>(x, w);
  };
  Column<S> right = column(0);
  for (int64_t i = 0; i < n; ++i) {
    const Column<S> left = right, middle = column(2 * i + 1);
    right = column(2 * i + 2);
    use(i, sum_window(left, middle, right));
  }
}

// The outputs of n such windows for a vector of channels. Returns whether they are right.
template <typename S, typename T>
MMSOFTPOOL_INLINE bool pool_neighbours(
    const Exponents<S>& exponents, const T* const* row, int64_t step, int64_t n, T* output) {
  using Vec = typename S::Vec;
  Vec max = S::load(row[0]);
  for (int64_t w = 0; w < (2 * n + 1) * step; w += step) {
    for (int t = 0; t < 3; ++t) {
      const Vec x = S::load(row[t] + w);
      max = x > max ? x : max;
      __builtin_prefetch(row[t] + w + 4 * n * step);
    }
  }
  const Vec floor = exponents.floor * (least_exponent / -127);
  typename S::Bits wrong{};
  for_each_neighbour<S>(
      row, step, n,
      [&](int64_t, int, Vec x) INLINED {
        const Vec d = x - max;
        return S::template exp2<weight_scale>(exponents.log2e_alpha * (floor > d ? floor : d));
      },
      [&](int64_t i, const WindowSums<S>& window) INLINED {
        S::store(window.top + window.below, output + i * step);
        wrong |= is_wrong(window);
      });
  return none_of(wrong);
}

// Calls together(ow, n, c) for n neighbouring windows of a row from ow on and a vector of channels
// from c on, and each(ow, end, c, number) for the windows [ow, end) and channels for which that is
// false, or which have no such neighbours or do not share their weights.
template <typename S, typename Together, typename Each>
MMSOFTPOOL_INLINE void for_each_window(
    const Axis& width, size_t rows, int64_t channels, bool shares, Together&& together,
    Each&& each) {
  for (int64_t ow = 0, end; ow < width.out; ow = end) {
    const int64_t n = shares ? neighbours(width, rows, ow) : 0;
    end = ow + std::max<int64_t>(n, 1);
    for (int64_t c = 0, number; c < channels; c += number) {
      const bool share = n > 0 && c + S::lanes <= channels;
      number = share ? S::lanes : channels - c;
      if (!share || !together(ow, n, c)) {
        each(ow, end, c, number);
      }
    }
  }
}

// Calls visit(taps, vectors, c, n) for vectors of n channels from c on: `Many` of them at once for
// windows of many taps, whose number K is not known when compiling. The last vector may have fewer
// lanes.
template <int K, typename S, typename Many, typename Visit>
MMSOFTPOOL_INLINE void for_each_vector(int64_t channels, Visit&& visit) {
  const typename S::All all;
  const std::integral_constant<int, K> taps;
  int64_t c = 0;
  if constexpr (K == 0) {
    constexpr int64_t block = Many::size() * S::lanes;
    for (; c + block <= channels; c += block) {
      visit(taps, Many(), c, all);
    }
  }
  for (; c + S::lanes <= channels; c += S::lanes) {
    visit(taps, OneVector(), c, all);
  }
  if (c < channels) {
    visit(std::integral_constant<int, 0>(), OneVector(), c, channels - c);
  }
}

// Pools one window. taps: where its channels begin.
template <int Bytes, typename S, typename T>
MMSOFTPOOL_INLINE void pool_window(
    const Exponents<S>& exponents, const Pointers<const T>& taps, int64_t channels, T* pixel) {
  using Many = std::make_index_sequence<Bytes == 64 ? 4 : 2>;
  const T* const* const tap = taps.data();
  with_taps(taps.size(), [&](auto constant) INLINED {
    for_each_vector<constant.value, S, Many>(
        channels, [&](auto known, auto vectors, int64_t c, auto n) INLINED {
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
  const Axis& width = pooling.width;
  const int64_t channels = pooling.channels;
  const bool shares = !std::is_same_v<T, double> && pooling.alpha > 1e-9;  // else products overflow
  Pointers<const T> rows, taps;
  rows.reserve(pooling.depth.kernel_size * pooling.height.kernel_size);
  taps.reserve(pooling.taps());
  for_each_output_row(
      pooling, begin, end, [&](int64_t row, int64_t image, int64_t od, int64_t oh) INLINED {
        rows.clear();
        for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) INLINED {
          const int64_t number = (image * pooling.depth.in + d) * pooling.height.in + h;
          rows.push_back(input + number * width.in * channels);
        });
        T* const output_row = output + row * width.out * channels;
        const auto together = [&](int64_t ow, int64_t n, int64_t c) INLINED {
          if constexpr (std::is_same_v<T, double>) {
            return false;
          } else {
            const int64_t first = width.first_input(ow) * channels + c;
            const T* const taps[] = {rows[0] + first, rows[1] + first, rows[2] + first};
            return pool_neighbours<S>(exponents, taps, channels, n, output_row + ow * channels + c);
          }
        };
        const auto each = [&](int64_t ow, int64_t end, int64_t c, int64_t number) INLINED {
          for (; ow < end; ++ow) {
            taps.clear();
            for (const T* const row : rows) {
              for_each_column(
                  width, ow, [&](int64_t w) INLINED { taps.push_back(row + w * channels + c); });
            }
            pool_window<Bytes>(exponents, taps, number, output_row + ow * channels + c);
          }
        };
        for_each_window<S>(width, rows.size(), channels, shares, together, each);
      });
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
        channels, [&](auto known, auto vectors, int64_t c, auto n) INLINED {
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

// The weights of taps relative to max, as right far below it as near to it: with c = alpha log2(e),
// m = round(c max) and n = round(c x - m) it is 2^n 2^(c x - (m + n)), whose last exponent is
// rounded once and is at most 1/2.
template <typename S>
class FusedWeights {
 public:
  using Vec = typename S::Vec;

  MMSOFTPOOL_INLINE FusedWeights(const Exponents<S>& exponents, Vec max)
      : c_(exponents.log2e_alpha) {
    constexpr float integer = 0x1.8p23f;  // what is added to it is rounded to an integer
    const Vec shifted = c_ * max + integer;
    m_ = shifted - integer;
    least_ = (m_ + least_exponent) / c_;
  }

  // The lanes in which weights may be wrong.
  MMSOFTPOOL_INLINE auto wrong() const { return S::is_beyond(m_, 0x1p21f); }

  MMSOFTPOOL_INLINE Vec operator()(Vec x) const {
    constexpr float magic = 12583039.0f + weight_scale;  // as in Simd::exp2
    x = least_ > x ? least_ : x;
    const Vec shifted = S::fused_multiply_subtract(x, c_, m_) + magic;
    const Vec f = S::fused_multiply_subtract(x, c_, m_ + (shifted - magic));
    return S::exp2_fraction(f) * (Vec)((typename S::Bits)shifted << 23);
  }

 private:
  Vec c_, m_, least_;
};

// Adds the gradients of n windows as in pool_neighbours() to `sums`, for a vector of channels, or
// returns false where they would be wrong. row, sums: where the first tap of each row is.
template <typename S, typename T, typename A>
MMSOFTPOOL_INLINE bool add_neighbours(
    const Exponents<S>& exponents, Gradient gradient, const T* const* row, A* const* sums,
    int64_t step, int64_t sums_step, int64_t n, const T* grad_output) {
  using Vec = typename S::Vec;
  constexpr A most = 1e14f;  // products of these do not overflow
  Vec max = S::load(row[0]), min = max;
  for (int64_t w = 0; w < (2 * n + 1) * step; w += step) {
    for (int t = 0; t < 3; ++t) {
      const Vec x = S::load(row[t] + w);
      max = x > max ? x : max;
      min = min > x ? x : min;
      __builtin_prefetch(row[t] + w + 2 * n * step);
    }
  }
  for (int64_t w = 0; w < (2 * n + 1) * sums_step; w += sums_step) {
    for (int t = 0; t < 3; ++t) {
      __builtin_prefetch(sums[t] + w + 2 * n * sums_step);
    }
  }
  // The gradient of a tap is its weight times the sum of slope (x - top) + offset of its windows.
  Vec weights[2 * most_neighbours + 1][3];
  Vec top[most_neighbours], slope[most_neighbours], offset[most_neighbours];
  const FusedWeights<S> weight(exponents, max);
  typename S::Bits wrong = weight.wrong() | S::is_beyond(exponents.alpha * (max - min), most);
  for_each_neighbour<S>(
      row, step, n, [&](int64_t i, int t, Vec x) INLINED { return weights[i][t] = weight(x); },
      [&](int64_t i, const WindowSums<S>& window) INLINED {
        const Vec g = S::load(grad_output + i * step), scale = g / window.sum;
        // The factor of the weights must not bring back digits that scale or slope have lost.
        const Vec least = exponents.alpha < S::splat(1) ? exponents.alpha * scale : scale;
        wrong |= is_wrong(window) | S::is_beyond(g, most) |
                 (S::is_within(least, std::numeric_limits<A>::min()) & S::is_beyond(g, 0));
        top[i] = window.top;
        slope[i] = gradient == Gradient::exact ? exponents.alpha * scale : Vec{};
        offset[i] = scale - slope[i] * window.below;
      });
  if (!none_of(wrong)) {
    return false;
  }
  const auto of = [&](int64_t i, Vec x) INLINED { return slope[i] * (x - top[i]) + offset[i]; };
  const auto add = [&](int64_t i, auto&& sum) INLINED {
    for (int t = 0; t < 3; ++t) {
      A* const to = sums[t] + i * sums_step;
      S::store(S::load(to) + weights[i][t] * sum(S::load(row[t] + i * step)), to);
    }
  };
  add(0, [&](Vec x) INLINED { return of(0, x); });
  for (int64_t i = 0; i < n; ++i) {
    add(2 * i + 1, [&](Vec x) INLINED { return of(i, x); });
    if (i + 1 < n) {
      add(2 * i + 2, [&](Vec x) INLINED { return of(i, x) + of(i + 1, x); });
    } else {
      add(2 * i + 2, [&](Vec x) INLINED { return of(i, x); });
    }
  }
  return true;
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
  constexpr bool can_share = S::has_fused && !std::is_same_v<T, double>;
  const bool shares = can_share && pooling.alpha > 1e-9 && pooling.alpha < 1e9;
  Pointers<const T> rows, taps;
  Pointers<A> sum_rows, sums;  // as the rows and the taps
  std::vector<A> scratch(pooling.taps() * BackwardVectors<Bytes>::size() * S::lanes);
  // Where gradients are set, not added to; see add_gradients().
  const bool tiled = tile_the_map(pooling) && pooling.taps() != 9;

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
      const auto together = [&](int64_t ow, int64_t n, int64_t c) INLINED {
        if constexpr (!can_share) {
          return false;
        } else {
          const int64_t w = width.first_input(ow), first = w * all_channels + c;
          const int64_t sum = w * sums_step + c;
          const T* const taps[] = {rows[0] + first, rows[1] + first, rows[2] + first};
          A* const sums[] = {sum_rows[0] + sum, sum_rows[1] + sum, sum_rows[2] + sum};
          return add_neighbours<S>(
              exponents, pooling.gradient, taps, sums, all_channels, sums_step, n,
              grad_pixel + ow * all_channels + c);
        }
      };
      const auto each = [&](int64_t ow, int64_t end, int64_t c, int64_t number) INLINED {
        for (; ow < end; ++ow) {
          taps.clear();
          sums.clear();
          for (size_t r = 0; r < rows.size(); ++r) {
            for_each_column(width, ow, [&](int64_t w) INLINED {
              taps.push_back(rows[r] + w * all_channels + c);
              sums.push_back(sum_rows[r] + w * sums_step + c);
            });
          }
          add_gradients<Bytes>(
              exponents, pooling.gradient, taps, sums, tiled, grad_pixel + ow * all_channels + c,
              number, scratch.data());
        }
      };
      for_each_window<S>(width, rows.size(), channels, shares, together, each);
      grad_pixel += width.out * all_channels;
    };
    const auto write = [&](int64_t d, int64_t h, A* sums) INLINED {
      write_row<S>(sums, sums_step, grad_input + row_start(d, h), all_channels, width.in, channels);
    };
    if constexpr (in_place) {
      // Rows are set to 0 when the first windows reach them, so that they are in the cache.
      int64_t cleared = tiled ? depth.in * height.in : 0;
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
