// Overlapping windows of stride 1, K x K with an odd K, such as the 5 x 5, 9 x 9 and 13 x 13 of
// YOLO's SPP: each input has one exponential, not one for every window around it.
//
// The weights of a window are powers 2^(c x - reference), c = alpha log2 e. The reference, from one
// input of the plane, cancels in every window; it only sets the range. Where that does not suffice
// (a window far from the reference, NaN, infinity), the result is not finite at first, and the
// thread computes it again in the way of generic.h.
//
// A thread has four columns and walks down some rows of a plane. It sums each row over K columns,
// and then over the last K rows.
#pragma once

#include <algorithm>

#include "pack.h"

namespace mmsoftpool::cuda {

// Sums over the last K rows of N numbers, while rows come in: of a turn of K rows, the sum of those
// that have come and the sums that the last turn has left.
template <int K, int N>
struct RowSums {
  float rows[K][N] = {};  // of the turn; before they come, the last turn's sums of later rows
  float sum[N];

  MMSOFTPOOL_BODY void start_turn() {
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < N; ++j) {
      float later = 0;
      MMSOFTPOOL_UNROLL
      for (int k = K - 1; k >= 0; --k) {
        const float row = rows[k][j];
        rows[k][j] = later;
        later += row;
      }
      sum[j] = 0;
    }
  }
  // Row k of the turn; it becomes the sum over K rows.
  MMSOFTPOOL_BODY void add(int k, float (&row)[N]) {
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < N; ++j) {
      const float number = row[j];
      sum[j] += number;
      row[j] = k + 1 < K ? rows[k][j] + sum[j] : sum[j];
      rows[k][j] = number;
    }
  }
};
template <int N>
struct RowSums<3, N> {
  float last[N] = {}, pair[N] = {};  // the last row, and the last two

  MMSOFTPOOL_BODY void start_turn() {}
  MMSOFTPOOL_BODY void add(int, float (&row)[N]) {
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < N; ++j) {
      const float number = row[j];
      row[j] = pair[j] + number;
      pair[j] = last[j] + number;
      last[j] = number;
    }
  }
};

// The sums over K neighbours. What they share is added up once.
template <int K, int N>
MMSOFTPOOL_BODY void add_columns(const float (&x)[N + K - 1], float (&sums)[N]) {
  if constexpr (K == 3) {
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < N; ++j) {
      const int even = j - j % 2;  // columns 2 i and 2 i + 1 share two
      sums[j] = x[j % 2 == 0 ? j : j + 2] + (x[even + 1] + x[even + 2]);
    }
  } else {
    float shared = x[N - 1];
    MMSOFTPOOL_UNROLL
    for (int j = N; j < K; ++j) {
      shared += x[j];
    }
    float left = 0, right = 0;
    sums[N - 1] = shared;
    MMSOFTPOOL_UNROLL
    for (int j = N - 2; j >= 0; --j) {
      left = j == N - 2 ? x[j] : x[j] + left;
      sums[j] = left + shared;
    }
    MMSOFTPOOL_UNROLL
    for (int j = 1; j < N; ++j) {
      right = j == 1 ? x[K] : right + x[K - 1 + j];
      sums[j] += right;
    }
  }
}

// How a thread reads and writes rows. As whole packs: the tensors are contiguous and all rows are
// aligned packs of four numbers, as many for the output as for the input. Otherwise number by
// number, in any layout; inside a plane, where all columns are there, without looking.
enum class Access { packs, numbers, inside };

template <int K>
struct RingArguments {
  static constexpr int cols = 4, half = K / 2;

  Exponent<float> exponent;
  float per_log2e_alpha;
  float slope;  // d log(2^t) / dt for the exact gradient, 0 for the paper's
  Gradient gradient;
  int32_t in_h, in_w, out_h, out_w;
  int32_t shift_h, shift_w;          // of the middle of the first window
  int32_t step;                      // from a column to the next
  uint32_t channels, strips, parts;  // of an image or plane
  int32_t rows;                      // that a thread walks down
  int64_t in_size, out_size;         // from an image or plane to the next
  int64_t outputs, threads;

  RingArguments(const Pooling& pooling, int64_t rows)
      : exponent(make_exponent<float>(pooling)),
        per_log2e_alpha(1 / exponent.log2e_alpha_per_unit),
        slope(pooling.gradient == Gradient::exact ? 0.6931472f : 0.0f),
        gradient(pooling.gradient),
        in_h(static_cast<int32_t>(pooling.height.in)),
        in_w(static_cast<int32_t>(pooling.width.in)),
        out_h(static_cast<int32_t>(pooling.height.out)),
        out_w(static_cast<int32_t>(pooling.width.out)),
        shift_h(half - static_cast<int32_t>(pooling.height.padding)),
        shift_w(half - static_cast<int32_t>(pooling.width.padding)),
        step(pooling.layout == Layout::channels_last ? static_cast<int32_t>(pooling.channels) : 1),
        channels(static_cast<uint32_t>(step)),
        strips(static_cast<uint32_t>((in_w + cols - 1) / cols)),
        parts(static_cast<uint32_t>((in_h + rows - 1) / rows)),
        rows(static_cast<int32_t>(rows)),
        in_size(pooling.in_plane() * step),
        out_size(pooling.out_plane() * step),
        outputs(pooling.planes() * pooling.out_plane()),
        threads(pooling.planes() * strips * parts) {}

  // With so many rows a thread that there are enough threads to fill any GPU, but not fewer than K:
  // the K - 1 rows above and below are read by the neighbours as well.
  static RingArguments of(const Pooling& pooling) {
    constexpr int64_t wanted = 1 << 17;
    int64_t parts = (pooling.height.in + 8 * K - 9) / (8 * K - 8);
    const int64_t threads = RingArguments(pooling, pooling.height.in).threads;
    while (threads * parts < wanted && pooling.height.in / (2 * parts) >= K) {
      parts *= 2;
    }
    return RingArguments(pooling, (pooling.height.in + parts - 1) / parts);
  }

  static bool fits(const Pooling& pooling) {
    const int64_t step = pooling.layout == Layout::channels_last ? pooling.channels : 1;
    const int64_t beyond = 4 * K;  // columns and rows whose offsets are computed, not read
    for (const Axis* axis : {&pooling.height, &pooling.width}) {
      if (axis->kernel_size != K || axis->stride != 1 || axis->dilation != 1 || axis->in < 1 ||
          axis->out < 1 || axis->in > INT32_MAX / 8) {
        return false;
      }
    }
    // An alpha near 0 has a unit of its own, see Exponent.
    return pooling.depth.in == 1 && pooling.depth.out == 1 && pooling.depth.kernel_size == 1 &&
           make_exponent<float>(pooling).unit == 1 &&
           (pooling.height.in + beyond) <= INT32_MAX / (pooling.width.in + beyond) / step &&
           RingArguments(pooling, 1).threads <= UINT32_MAX;
  }
  static bool has_packs(const Pooling& pooling, bool aligned) {
    return aligned && pooling.layout == Layout::contiguous && pooling.width.in % cols == 0 &&
           pooling.width.out == pooling.width.in && pooling.width.padding == half;
  }
};

// Rows and columns are those of the input; a window has that of its middle.
template <typename T, int K, Access access>
struct Ring {
  static_assert(sizeof(T) <= 4 && K % 2 == 1 && K <= 13);

  using Arguments = RingArguments<K>;
  static constexpr int kernel_size = K;
  static constexpr int cols = Arguments::cols, half = Arguments::half;
  static constexpr bool Packed = access == Access::packs, Inside = access == Access::inside;
  static constexpr float nan = std::numeric_limits<float>::quiet_NaN();

  // Which rows and columns thread i has, and where its plane begins.
  struct Place {
    int32_t begin, end, w;
    int64_t input, output;

    MMSOFTPOOL_BODY Place(const Arguments& a, uint32_t i) {
      const uint32_t c = i % a.channels;
      i /= a.channels;
      w = static_cast<int32_t>(i % a.strips) * cols;
      i /= a.strips;
      begin = static_cast<int32_t>(i % a.parts) * a.rows;
      end = begin + a.rows < a.in_h ? begin + a.rows : a.in_h;
      i /= a.parts;
      input = i * a.in_size + c;
      output = i * a.out_size + c;
    }

    // Whether all columns that the thread reads and writes are there.
    MMSOFTPOOL_BODY bool is_inside(const Arguments& a) const {
      constexpr int reach = K == 3 ? 2 * half : half;
      return w >= reach && w + cols + reach <= a.in_w && w - half >= a.shift_w &&
             w + cols + half - a.shift_w <= a.out_w;
    }
  };

  // Offsets of an element in a plane of the input, and of the output; whether the latter has it.
  static MMSOFTPOOL_BODY int32_t input_at(const Arguments& a, int32_t h, int32_t w) {
    return (h * a.in_w + w) * (Packed ? 1 : a.step);
  }
  static MMSOFTPOOL_BODY int32_t output_at(const Arguments& a, int32_t h, int32_t w) {
    return Packed ? (h - a.shift_h) * a.in_w + w
                  : ((h - a.shift_h) * a.out_w + w - a.shift_w) * a.step;
  }
  static MMSOFTPOOL_BODY bool has_output_row(const Arguments& a, int32_t h) {
    return uint32_t(h - a.shift_h) < uint32_t(a.out_h);
  }
  static MMSOFTPOOL_BODY bool has_output(const Arguments& a, int32_t w) {
    return Inside ||
           (Packed ? uint32_t(w) < uint32_t(a.in_w) : uint32_t(w - a.shift_w) < uint32_t(a.out_w));
  }

  // Reads `Count` neighbours if they are inside.
  template <int Count, typename E>
  static MMSOFTPOOL_BODY void read_if(bool inside, const E* from, float outside, float* numbers) {
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Count; ++j) {
      numbers[j] = outside;
    }
    if (inside) {
      const Pack<E, Count> pack = *reinterpret_cast<const Pack<E, Count>*>(from);
      unpack(pack, numbers);
    }
  }
  // Reads the four columns of which the first is at `from`, and `Beside` on either side; `outside`
  // where there are none. has(j) says whether column j, from the first one on, is there.
  template <int Beside, typename E, typename Has>
  static MMSOFTPOOL_BODY void read_row(
      const Arguments& a, const E* from, float outside, const Has& has,
      float (&row)[cols + 2 * Beside]) {
    if constexpr (Packed) {
      // On either side a pack, of which one or two numbers may do, and some of another one.
      constexpr int near = Beside < cols ? Beside : cols, far = Beside - near;
      constexpr int pack = near == 3 ? 4 : near;
      read_if<cols>(true, from, outside, row + Beside);
      if constexpr (near > 0) {
        float left[pack], right[pack];
        read_if<pack>(has(-1), from - pack, outside, left);
        read_if<pack>(has(cols), from + cols, outside, right);
        MMSOFTPOOL_UNROLL
        for (int j = 0; j < near; ++j) {
          row[far + j] = left[pack - near + j];
          row[Beside + cols + j] = right[j];
        }
      }
      if constexpr (far > 0) {
        static_assert(far <= 2);
        read_if<far>(has(-cols - 1), from - cols - far, outside, row);
        read_if<far>(has(2 * cols), from + 2 * cols, outside, row + Beside + 2 * cols);
      }
    } else {
      MMSOFTPOOL_UNROLL
      for (int j = -Beside; j < cols + Beside; ++j) {
        read_if<1>(has(j), from + int64_t(a.step) * j, outside, row + Beside + j);
      }
    }
  }
  template <int Beside>
  static MMSOFTPOOL_BODY void read_input(
      const Arguments& a, const T* plane, int32_t h, int32_t w, float outside,
      float (&row)[cols + 2 * Beside]) {
    read_row<Beside>(
        a, plane + input_at(a, h, w), outside,
        [&](int j) { return Inside || uint32_t(w + j) < uint32_t(a.in_w); }, row);
  }
  template <int Beside, typename E>
  static MMSOFTPOOL_BODY void read_output(
      const Arguments& a, const E* plane, int32_t h, int32_t w, float (&row)[cols + 2 * Beside]) {
    read_row<Beside>(
        a, plane + output_at(a, h, w), 0, [&](int j) { return has_output(a, w + j); }, row);
  }
  // Writes the columns of which the first is at `to`, if there are any.
  template <typename E, typename Has>
  static MMSOFTPOOL_BODY void write_row(
      const Arguments& a, const float (&row)[cols], E* to, const Has& has) {
    if constexpr (Packed) {
      Pack<E, cols> pack;
      pack_numbers<cols>(row, pack);
      *reinterpret_cast<Pack<E, cols>*>(to) = pack;
    } else {
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < cols; ++j) {
        if (has(j)) {
          to[int64_t(a.step) * j] = E(row[j]);
        }
      }
    }
  }
  template <typename E>
  static MMSOFTPOOL_BODY void write_output(
      const Arguments& a, const float (&row)[cols], int32_t h, int32_t w, E* plane) {
    write_row(a, row, plane + output_at(a, h, w), [&](int j) { return has_output(a, w + j); });
  }
  static MMSOFTPOOL_BODY void write_input(
      const Arguments& a, const float (&row)[cols], int32_t h, int32_t w, T* plane) {
    write_row(a, row, plane + input_at(a, h, w), [&](int j) { return Inside || w + j < a.in_w; });
  }

  // From inputs to the logarithms of their powers.
  struct Reference {
    float scale;    // c, or NaN for a plane with numbers too large
    float log2;     // of the powers
    float outside;  // an input of a power of 0

    // The largest of some inputs in rows [begin, end), as near to the windows' as may be.
    MMSOFTPOOL_BODY
    Reference(const Arguments& a, const T* plane, int32_t begin, int32_t end, int32_t w) {
      float x = -std::numeric_limits<float>::infinity();
      const int32_t rows[] = {begin, (begin + end) / 2, end - 1};
      MMSOFTPOOL_UNROLL
      for (const int32_t h : rows) {
        float row[cols];
        read_input<0>(a, plane, h, w, x, row);
        x = fmaxf(fmaxf(fmaxf(row[0], row[1]), fmaxf(row[2], row[3])), x);
      }
      x = is_finite(x) ? x : 0;
      log2 = x * a.exponent.log2e_alpha_per_unit;
      scale = fabsf(log2) <= 0x1p20f ? a.exponent.log2e_alpha_per_unit : nan;
      outside = x - 200 * a.per_log2e_alpha;
    }
    MMSOFTPOOL_BODY float logarithm(float x) const { return std::fma(x, scale, -log2); }
  };
  // For what one thread does from input to result, and for what the neighbours do with its sums.
  static MMSOFTPOOL_BODY Reference
  own_reference(const Arguments& a, const T* plane, const Place& place) {
    return Reference(a, plane, place.begin, place.end, place.w);
  }
  static MMSOFTPOOL_BODY Reference common_reference(const Arguments& a, const T* plane) {
    return Reference(a, plane, 0, a.in_h, a.in_w / 2 / cols * cols);
  }
  static MMSOFTPOOL_BODY bool is_finite(float x) {
    return fabsf(x) <= std::numeric_limits<float>::max();
  }
  // Whether taps of a power of 0 do not count in a sum of powers, and whether it has a reciprocal.
  // Logarithms have rounding errors in proportion to them.
  static MMSOFTPOOL_BODY bool is_in_range(float sum) {
    constexpr float range = K == 3 ? 0x1p40f : 0x1p88f;
    return (sum >= 1 / range) & (sum <= range);
  }

  // Sums over the columns of row h, for the windows in the middle of the columns read: of powers,
  // and of those times inputs (for a mean whose rounding error is that of the output) or times
  // logarithms (for differences of inputs).
  template <bool TimesInput, int N>
  static MMSOFTPOOL_BODY void add_powers(
      const Arguments& a, const Reference& reference, const T* plane, int32_t h, int32_t w,
      float (&sums)[N], float (&means)[N]) {
    float x[N + K - 1], powers[N + K - 1];
    read_input<(N + K - 1 - cols) / 2>(a, plane, h, w, reference.outside, x);
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < N + K - 1; ++j) {
      const float v = reference.logarithm(x[j]);
      powers[j] = exp2_or_zero(v);
      x[j] = powers[j] * (TimesInput ? x[j] : v);
    }
    add_columns<K>(powers, sums);
    add_columns<K>(x, means);
  }

  // Walks down to the last row that windows of rows [begin, end) reach. add(h, sums, means) gives
  // the sums over the columns of a row; finish(h, sums, means) gets those over K rows around row h.
  template <int N, typename Has, typename Add, typename Finish>
  static MMSOFTPOOL_BODY void walk(
      int32_t begin, int32_t end, const Has& has, const Add& add, const Finish& finish) {
    RowSums<K, N> all_sums, all_means;
    const int32_t last = end + half;
    MMSOFTPOOL_NO_UNROLL
    for (int32_t turn = begin > half ? begin - half : 0; turn < last; turn += K) {
      all_sums.start_turn();
      all_means.start_turn();
      MMSOFTPOOL_UNROLL
      for (int k = 0; k < K; ++k) {
        const int32_t h = turn + k;
        float sums[N] = {}, means[N] = {};
        if (h < last && has(h)) {
          add(h, sums, means);
        }
        all_sums.add(k, sums);
        all_means.add(k, means);
        if (h - half >= begin && h < last) {
          finish(h - half, sums, means);
        }
      }
    }
  }

  // The window in the middle of which is (h, w), in the way of generic.h.
  static MMSOFTPOOL_BODY Window<float> general_window(
      const Arguments& a, const T* plane, int32_t h, int32_t w) {
    const auto for_each_tap = [&](const auto& visit) {
      MMSOFTPOOL_NO_UNROLL
      for (int32_t i = h > half ? h - half : 0; i <= h + half && i < a.in_h; ++i) {
        MMSOFTPOOL_NO_UNROLL
        for (int32_t j = w > half ? w - half : 0; j <= w + half && j < a.in_w; ++j) {
          visit(float(plane[input_at(a, i, j)]));
        }
      }
    };
    float max = Window<float>::lowest;
    for_each_tap([&](float x) { max = Window<float>::update_max(max, x); });
    Window<float> window(a.exponent, max);
    for_each_tap([&](float x) { window.add(x); });
    return window;
  }
  // Calls visit(h, w) for the windows around input (h, w).
  template <typename Visit>
  static MMSOFTPOOL_BODY void for_each_window(
      const Arguments& a, int32_t h, int32_t w, const Visit& visit) {
    MMSOFTPOOL_NO_UNROLL
    for (int32_t i = h - half; i <= h + half; ++i) {
      MMSOFTPOOL_NO_UNROLL
      for (int32_t j = w - half; j <= w + half; ++j) {
        if (has_output_row(a, i) && has_output(a, j)) {
          visit(i, j);
        }
      }
    }
  }
  // Calls visit(h, w) for all elements of a thread.
  template <typename Visit>
  static MMSOFTPOOL_BODY void for_each_element(
      const Arguments& a, const Place& place, const Visit& visit) {
    MMSOFTPOOL_NO_UNROLL
    for (int32_t h = place.begin; h < place.end; ++h) {
      MMSOFTPOOL_NO_UNROLL
      for (int32_t w = place.w; w < place.w + cols && w < a.in_w; ++w) {
        visit(h, w);
      }
    }
  }

  static MMSOFTPOOL_BODY void forward(const Arguments& a, const T* input, T* output, uint32_t i) {
    const Place place(a, i);
    input += place.input;
    output += place.output;
    const Reference reference = own_reference(a, input, place);
    bool is_wrong = false;
    walk<cols>(
        place.begin, place.end, [&](int32_t h) { return h < a.in_h; },
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          add_powers<true>(a, reference, input, h, place.w, sums, means);
        },
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          if (!has_output_row(a, h)) {
            return;
          }
          float middle[cols];
          if (sizeof(T) == 4) {
            read_input<0>(a, input, h, place.w, 0, middle);
          }
          MMSOFTPOOL_UNROLL
          for (int j = 0; j < cols; ++j) {
            float y = means[j] * reciprocal(sums[j]);
            const bool is_right = is_in_range(sums[j]) & is_finite(y);
            if (sizeof(T) == 4) {
              // Within the rounding error of the middle input it is that: a window of one value.
              y = fabsf(y - middle[j]) <= 0x1p-21f * fabsf(middle[j]) ? middle[j] : y;
            }
            means[j] = is_right ? y : nan;
            is_wrong |= !is_right;
          }
          write_output(a, means, h, place.w, output);
        });
    if (is_wrong) {
      for_each_element(a, place, [&](int32_t h, int32_t w) {
        if (has_output_row(a, h) && has_output(a, w)) {
          T& y = output[output_at(a, h, w)];
          if (!(float(y) == float(y))) {
            y = T(general_window(a, input, h, w).output());
          }
        }
      });
    }
  }

  // The gradient of input i is, with its power p_i = 2^(v_i) and the sum S and mean logarithm m of
  // the powers of each window around it, the sum of g p_i / S (1 + slope (v_i - m)), which is
  // p_i (a + b v_i) with the sums over the windows of what two_sums returns.
  // For a window out of range a is NaN.
  struct TwoSums {
    float a, b;
  };
  static MMSOFTPOOL_BODY TwoSums
  two_sums(const Arguments& a, float grad_output, float sum, float mean) {
    const float per_sum = reciprocal(sum);
    const float scale = grad_output * per_sum, slope = a.slope * scale;
    const float first = scale - slope * (mean * per_sum);
    return {is_in_range(sum) ? first : nan, slope};
  }
  static MMSOFTPOOL_BODY float gradient(
      const Reference& reference, float x, float first, float second) {
    const float v = reference.logarithm(x);
    return exp2_or_zero(v) * std::fma(v, second, first);
  }

  // False if there are wrong ones.
  static MMSOFTPOOL_BODY bool write_gradients(
      const Arguments& a, const Reference& reference, const T* input, int32_t h, int32_t w,
      const float (&first)[cols], const float (&second)[cols], T* grad_input) {
    float x[cols];
    read_input<0>(a, input, h, w, 0, x);
    bool is_right = true;
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < cols; ++j) {
      x[j] = gradient(reference, x[j], first[j], second[j]);
      is_right &= is_finite(x[j]);
    }
    write_input(a, x, h, w, grad_input);
    return is_right;
  }

  // The first step of the backward, for K > 3: writes a and b of each window to the first two
  // quarters of the workspace; for a window out of range something not finite and three numbers as
  // summarize_window.
  static MMSOFTPOOL_BODY void summarize(
      const Arguments& a, const T* grad_output, const T* input, float* workspace, uint32_t i) {
    const Place place(a, i);
    input += place.input;
    grad_output += place.output;
    workspace += place.output;
    const Reference reference = common_reference(a, input);
    bool is_wrong = false;
    walk<cols>(
        place.begin, place.end, [&](int32_t h) { return h < a.in_h; },
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          add_powers<false>(a, reference, input, h, place.w, sums, means);
        },
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          if (!has_output_row(a, h)) {
            return;
          }
          float grad[cols];
          read_output<0>(a, grad_output, h, place.w, grad);
          MMSOFTPOOL_UNROLL
          for (int j = 0; j < cols; ++j) {
            const TwoSums numbers = two_sums(a, grad[j], sums[j], means[j]);
            sums[j] = numbers.a;
            is_wrong |= !is_finite(numbers.a);
            means[j] = numbers.b;
          }
          write_output(a, sums, h, place.w, workspace);
          write_output(a, means, h, place.w, workspace + a.outputs);
        });
    if (is_wrong) {
      for_each_element(a, place, [&](int32_t h, int32_t w) {
        if (has_output_row(a, h) && has_output(a, w)) {
          float* const numbers = workspace + output_at(a, h, w);
          if (!is_finite(*numbers)) {
            const Window<float> window = general_window(a, input, h, w);
            numbers[a.outputs] = window.max;
            numbers[2 * a.outputs] = window.scale(float(grad_output[output_at(a, h, w)]));
            numbers[3 * a.outputs] = window.offset();
          }
        }
      });
    }
  }
  // The second step.
  static MMSOFTPOOL_BODY void backward(
      const Arguments& a, const float* workspace, const T* input, T* grad_input, uint32_t i) {
    const Place place(a, i);
    input += place.input;
    grad_input += place.input;
    workspace += place.output;
    const Reference reference = common_reference(a, input);
    bool is_wrong = false;
    walk<cols>(
        place.begin, place.end, [&](int32_t h) { return has_output_row(a, h); },
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          float row[cols + K - 1];
          read_output<half>(a, workspace, h, place.w, row);
          add_columns<K>(row, sums);
          read_output<half>(a, workspace + a.outputs, h, place.w, row);
          add_columns<K>(row, means);
        },
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          is_wrong |= !write_gradients(a, reference, input, h, place.w, sums, means, grad_input);
        });
    if (is_wrong) {
      for_each_element(a, place, [&](int32_t h, int32_t w) {
        T& grad = grad_input[input_at(a, h, w)];
        if (!is_finite(float(grad))) {
          const float x = float(input[input_at(a, h, w)]);
          float sum = 0;
          for_each_window(a, h, w, [&](int32_t oh, int32_t ow) {
            const float* const numbers = workspace + output_at(a, oh, ow);
            const float b = numbers[a.outputs];
            if (is_finite(*numbers)) {
              sum += x == -std::numeric_limits<float>::infinity()
                         ? 0
                         : gradient(reference, x, *numbers, b);
            } else {
              sum += numbers[2 * a.outputs] *
                     Window<float>(a.exponent, b).share(x, numbers[3 * a.outputs], a.gradient);
            }
          });
          grad = T(sum);
        }
      });
    }
  }

  // Both steps at once, for K = 3, where the neighbours' sums cost less than a workspace. The
  // windows have one column more on either side than the thread, and one row.
  static MMSOFTPOOL_BODY void backward_at_once(
      const Arguments& a, const T* grad_output, const T* input, T* grad_input, uint32_t i) {
    const Place place(a, i);
    grad_output += place.output;
    input += place.input;
    grad_input += place.input;
    const Reference reference = own_reference(a, input, place);
    bool is_wrong = false;
    RowSums<3, cols> all_firsts, all_seconds;
    walk<cols + 2>(
        place.begin - 1, place.end + 1, [&](int32_t h) { return h < a.in_h; },
        [&](int32_t h, float (&sums)[cols + 2], float (&means)[cols + 2]) {
          add_powers<false>(a, reference, input, h, place.w, sums, means);
        },
        [&](int32_t h, float (&sums)[cols + 2], float (&means)[cols + 2]) {
          float first[cols] = {}, second[cols] = {};
          if (has_output_row(a, h)) {
            float grad[cols + 2];
            read_output<1>(a, grad_output, h, place.w, grad);
            MMSOFTPOOL_UNROLL
            for (int j = 0; j < cols + 2; ++j) {
              // The columns beside a row have a gradient of 0.
              const float sum = has_output(a, place.w + j - 1) ? sums[j] : 1;
              const TwoSums numbers = two_sums(a, grad[j], sum, means[j]);
              sums[j] = numbers.a;
              means[j] = numbers.b;
            }
            add_columns<3>(sums, first);
            add_columns<3>(means, second);
          }
          all_firsts.add(0, first);
          all_seconds.add(0, second);
          if (h > place.begin) {
            is_wrong |=
                !write_gradients(a, reference, input, h - 1, place.w, first, second, grad_input);
          }
        });
    if (is_wrong) {
      for_each_element(a, place, [&](int32_t h, int32_t w) {
        T& grad = grad_input[input_at(a, h, w)];
        if (!is_finite(float(grad))) {
          const float x = float(input[input_at(a, h, w)]);
          float sum = 0;
          for_each_window(a, h, w, [&](int32_t oh, int32_t ow) {
            const Window<float> window = general_window(a, input, oh, ow);
            sum += window.scale(float(grad_output[output_at(a, oh, ow)])) *
                   window.share(x, window.offset(), a.gradient);
          });
          grad = T(sum);
        }
      });
    }
  }
};

// Calls run(ring) for thread i of a kernel for `ring`, or for the one that does not look for
// columns.
template <typename T, int K, Access access, typename Run>
MMSOFTPOOL_BODY void with_access(
    Ring<T, K, access> ring, const RingArguments<K>& a, uint32_t i, const Run& run) {
  if constexpr (access == Access::numbers) {
    if (typename decltype(ring)::Place(a, i).is_inside(a)) {
      return run(Ring<T, K, Access::inside>());
    }
  }
  run(ring);
}

// Calls run(ring) with the ring that fits the pooling and returns true, or returns false. `aligned`
// says that all tensors begin at a multiple of 16 bytes.
template <typename T, typename Run>
bool with_ring(const Pooling& pooling, bool aligned, const Run& run) {
  if (pooling.is_adaptive()) {
    return false;
  }
  if constexpr (sizeof(T) <= 4) {
    const auto run_if_it_fits = [&](auto kernel_size) {
      constexpr int K = decltype(kernel_size)::value;
      if (!RingArguments<K>::fits(pooling)) {
        return false;
      }
      RingArguments<K>::has_packs(pooling, aligned) ? run(Ring<T, K, Access::packs>())
                                                    : run(Ring<T, K, Access::numbers>());
      return true;
    };
    return run_if_it_fits(std::integral_constant<int, 3>()) ||
           run_if_it_fits(std::integral_constant<int, 5>()) ||
           run_if_it_fits(std::integral_constant<int, 7>()) ||
           run_if_it_fits(std::integral_constant<int, 9>()) ||
           run_if_it_fits(std::integral_constant<int, 11>()) ||
           run_if_it_fits(std::integral_constant<int, 13>());
  } else {
    return false;
  }
}

}  // namespace mmsoftpool::cuda
