// Overlapping windows of stride 1, K x K with an odd K, such as the 5 x 5, 9 x 9 and 13 x 13 of
// YOLO's SPP: each input has one exponential, not one for every window around it.
//
// The weights of a window are powers 2^(c x - reference), c = alpha log2 e. The reference, from one
// input of the plane, cancels in every window; it only sets the range. Where that does not suffice
// (a window far from the reference, a tiny gradient, NaN, infinity), the result is not finite at
// first, and the thread computes it again in the way of generic.h.
//
// A thread has four or eight columns (see cols) and walks down some rows of a plane. It sums each
// row over K columns, and then over the last K rows.
#pragma once

#include "generic.h"
#include "walk.h"

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
    // Four windows, or eight, share the columns in the middle.
    constexpr int group = N > K ? 4 : N;
    static_assert(group <= K && N % group == 0);
    MMSOFTPOOL_UNROLL
    for (int begin = 0; begin < N; begin += group) {
      const float* const columns = x + begin;
      float shared = columns[group - 1], left = 0, right = 0;
      MMSOFTPOOL_UNROLL
      for (int j = group; j < K; ++j) {
        shared += columns[j];
      }
      sums[begin + group - 1] = shared;
      MMSOFTPOOL_UNROLL
      for (int j = group - 2; j >= 0; --j) {
        left = j == group - 2 ? columns[j] : columns[j] + left;
        sums[begin + j] = left + shared;
      }
      MMSOFTPOOL_UNROLL
      for (int j = 1; j < group; ++j) {
        right = j == 1 ? columns[K] : right + columns[K - 1 + j];
        sums[begin + j] += right;
      }
    }
  }
}

// How a thread reads and writes rows. As whole packs: the tensors are contiguous and all rows are
// aligned packs of four numbers, as many for the output as for the input. Otherwise number by
// number, in any layout; inside a plane, where all columns are there, without looking.
enum class Access { packs, numbers, inside };

struct RingArguments : WalkArguments {
  Exponent<float> exponent;
  Indices<int32_t> indices;  // of an image or plane
  int32_t in_row, out_row;   // from a row to the next
  int32_t shift_h, shift_w;  // of the middle of the first window
  int64_t outputs;
};

// Rows and columns are those of the input; a window has that of its middle.
template <typename T, int K, Access access>
struct Ring {
  static_assert(sizeof(T) <= 4 && K % 2 == 1 && K <= 13);

  using Arguments = RingArguments;
  using Int = uint32_t;
  static constexpr bool two_steps = K > 3, has_slices = false;
  static constexpr int half = K / 2, whole_pack = access == Access::packs ? 4 : 1;
  // As many as registers allow: what neighbours share is computed once.
  static constexpr int cols = K <= 7 || (K == 9 && sizeof(T) == 2) ? 8 : 4;
  static constexpr bool Packed = access == Access::packs, Inside = access == Access::inside;
  static constexpr float nan = std::numeric_limits<float>::quiet_NaN();

  // The exact gradient of input i is, with its power p_i = 2^(v_i) and the sum S and mean logarithm
  // m of the powers of each window around it, the sum of g p_i / S (1 + slope (v_i - m)), which is
  // p_i (a + b v_i) with the sums of the windows' a and b. For a window out of range a is NaN.
  struct alignas(8) TwoSums {
    float a, b;
  };

  // A thread walks down `rows` rows; 0 for a number that suits the GPU, but not fewer than K: the
  // K - 1 rows above and below are read by the neighbours as well.
  static Arguments forward_arguments(const Pooling& pooling, int64_t rows = 0) {
    const int64_t strips = (pooling.width.in + cols - 1) / cols, height = pooling.height.in;
    if (rows == 0) {
      rows = choose_rows(pooling.planes() * strips, height, K, 8 * K - 8, 1 << 17);
    }
    const WalkArguments walk(pooling, 1, strips, height, rows);
    return {
        walk,
        make_exponent<float>(pooling),
        Indices<int32_t>(pooling),
        walk.in_w * walk.step,
        walk.out_w * walk.step,
        half - static_cast<int32_t>(pooling.height.padding),
        half - static_cast<int32_t>(pooling.width.padding),
        pooling.planes() * pooling.out_plane()};
  }
  static Arguments backward_arguments(const Pooling& pooling, int64_t rows = 0) {
    return forward_arguments(pooling, rows);
  }
  // How many images, or planes if the tensor is contiguous, a backward of two steps does at once:
  // so many that the workspace of the windows, four numbers each, stays in the GPU's cache.
  static int64_t batch(const Pooling& pooling) {
    constexpr int64_t outputs = 1 << 21;
    return std::max<int64_t>(1, outputs / (pooling.channels * pooling.out_plane()));
  }
  static int64_t workspace(const Pooling& pooling) {
    return two_steps ? 4 * pooling.planes() * pooling.out_plane() : 0;
  }

  static bool fits(const Pooling& pooling) {
    for (const Axis* axis : {&pooling.height, &pooling.width}) {
      if (axis->kernel_size != K || axis->stride != 1 || axis->dilation != 1 || axis->in < 1 ||
          axis->out < 1) {
        return false;
      }
    }
    Pooling image = pooling;
    image.batch = 1;
    image.channels = pooling.layout == Layout::channels_last ? pooling.channels : 1;
    constexpr int64_t longest = INT32_MAX / sizeof(TwoSums);
    return fits_32_bits(image) && pooling.width.in * image.channels <= longest &&
           pooling.width.out * image.channels <= longest &&
           forward_arguments(pooling, 1).threads <= UINT32_MAX;
  }
  static bool has_packs(const Pooling& pooling, bool aligned) {
    return aligned && pooling.layout == Layout::contiguous && pooling.width.in % whole_pack == 0 &&
           pooling.width.out == pooling.width.in && pooling.width.padding == half;
  }

  // Which rows and columns thread i has. `input` and `output` are where its first column is in
  // row 0, also if no window is there.
  struct Place {
    int32_t begin, end, w;
    int64_t input, output;

    MMSOFTPOOL_BODY Place(const Arguments& a, uint32_t i) {
      const WalkPlace place = a.find_place(i, 1);
      w = place.strip * cols;
      begin = place.row;
      end = begin + a.rows < a.in_h ? begin + a.rows : a.in_h;
      input = place.input + int64_t(w) * a.step;
      output = place.output + int64_t(w - a.shift_w) * a.step - int64_t(a.shift_h) * a.out_row;
    }

    // Whether all columns that the thread reads and writes are there.
    MMSOFTPOOL_BODY bool is_inside(const Arguments& a) const {
      constexpr int reach = K == 3 ? 2 * half : half;
      return w >= reach && w + cols + reach <= a.in_w && w - half >= a.shift_w &&
             w + cols + half - a.shift_w <= a.out_w;
    }
  };

  // Row h, from where row 0 is. One multiplication of 32 bits to 64.
  template <typename E>
  static MMSOFTPOOL_BODY E* find(E* from, int32_t row, int32_t h) {
    using Byte = std::conditional_t<std::is_const_v<E>, const char, char>;
    return reinterpret_cast<E*>(
        reinterpret_cast<Byte*>(from) + int64_t(h) * (row * int32_t(sizeof(E))));
  }
  static MMSOFTPOOL_BODY bool has_input(const Arguments& a, int32_t w) {
    return Inside || uint32_t(w) < uint32_t(a.in_w);
  }
  static MMSOFTPOOL_BODY bool has_output(const Arguments& a, int32_t w) {
    return Inside || (Packed ? has_input(a, w) : uint32_t(w - a.shift_w) < uint32_t(a.out_w));
  }

  // Reads the thread's columns of row h and `Beside` on either side.
  template <int Beside>
  static MMSOFTPOOL_BODY void read_input(
      const Arguments& a, const T* input, int32_t h, int32_t w, float outside,
      float (&row)[cols + 2 * Beside]) {
    read_row<Beside, cols, Beside, 1, whole_pack>(
        find(input, a.in_row, h), a.step, outside, [&](int j) { return has_input(a, w + j); }, row);
  }
  template <int Beside, typename E, typename Number>
  static MMSOFTPOOL_BODY void read_output(
      const Arguments& a, const E* plane, int32_t h, int32_t w, Number (&row)[cols + 2 * Beside]) {
    read_row<Beside, cols, Beside, 1, whole_pack>(
        find(plane, a.out_row, h), a.step, Number(), [&](int j) { return has_output(a, w + j); },
        row);
  }
  template <typename E, typename Number>
  static MMSOFTPOOL_BODY void write_output(
      const Arguments& a, const Number (&row)[cols], int32_t h, int32_t w, E* plane) {
    write_row<1, whole_pack>(
        row, find(plane, a.out_row, h), a.step, [&](int j) { return has_output(a, w + j); });
  }

  // From inputs to the logarithms of their powers.
  struct Reference {
    float scale;    // c, or NaN for a plane with numbers too large
    float log2;     // of the powers
    float outside;  // an input of a power of 0

    // From the largest of some inputs in three of the rows [begin, end), as near to the windows' as
    // may be: for windows of few inputs the mean of the three.
    MMSOFTPOOL_BODY
    Reference(const Arguments& a, const T* input, int32_t begin, int32_t end, int32_t w) {
      float max[3], x = -std::numeric_limits<float>::infinity();
      const int32_t rows[] = {begin, (begin + end) / 2, end - 1};
      MMSOFTPOOL_UNROLL
      for (int k = 0; k < 3; ++k) {
        float row[cols];
        read_input<0>(a, input, rows[k], w, -std::numeric_limits<float>::infinity(), row);
        max[k] = row[0];
        MMSOFTPOOL_UNROLL
        for (int j = 1; j < cols; ++j) {
          max[k] = fmaxf(max[k], row[j]);
        }
        x = fmaxf(x, max[k]);
      }
      const float mean = (max[0] + max[1] + max[2]) / 3;
      x = K == 3 && is_finite(mean) ? mean : x;
      x = is_finite(x) ? x : 0;
      log2 = x * a.log2e_alpha;
      scale = fabsf(log2) <= 0x1p20f ? a.log2e_alpha : nan;
      outside = x - 200 * a.per_log2e_alpha;
    }
    MMSOFTPOOL_BODY float logarithm(float x) const { return std::fma(x, scale, -log2); }
  };
  // For what one thread does from input to result, and for what the neighbours do with its sums.
  static MMSOFTPOOL_BODY Reference
  own_reference(const Arguments& a, const T* input, const Place& place) {
    return Reference(a, input, place.begin, place.end, place.w);
  }
  static MMSOFTPOOL_BODY Reference
  common_reference(const Arguments& a, const T* input, const Place& place) {
    const int32_t w = a.in_w / 2 / cols * cols;
    return Reference(a, input + int64_t(w - place.w) * a.step, 0, a.in_h, w);
  }
  static MMSOFTPOOL_BODY bool is_finite(float x) {
    return fabsf(x) <= std::numeric_limits<float>::max();
  }
  // NaN from the first number on that is not finite.
  static MMSOFTPOOL_BODY void check(float number, float& checked) {
    checked = std::fma(number, 0.0f, checked);
  }
  // Whether taps of a power of 0 do not count in a sum of powers, and whether it has a reciprocal.
  // Logarithms have rounding errors in proportion to them.
  static MMSOFTPOOL_BODY bool is_in_range(float sum) {
    constexpr float range = K == 3 ? 0x1p24f : 0x1p40f;
    return (sum >= 1 / range) & (sum <= range);
  }

  // Sums over the columns of row h, for the windows in the middle of the columns read: of powers,
  // and of those times inputs (for a mean whose rounding error is that of the output) or times
  // logarithms (for differences of inputs).
  template <bool TimesInput, int N>
  static MMSOFTPOOL_BODY void add_powers(
      const Arguments& a, const Reference& reference, const T* input, int32_t h, int32_t w,
      float (&sums)[N], float (&means)[N]) {
    float x[N + K - 1], powers[N + K - 1];
    read_input<(N + K - 1 - cols) / 2>(a, input, h, w, reference.outside, x);
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < N + K - 1; ++j) {
      const float v = reference.logarithm(x[j]);
      powers[j] = exp2_or_zero(v);
      x[j] = powers[j] * (TimesInput ? x[j] : v);
    }
    add_columns<K>(powers, sums);
    add_columns<K>(x, means);
  }

  // Rows [begin, end).
  struct Rows {
    int32_t begin, end;

    MMSOFTPOOL_BODY bool has(int32_t h) const {
      return uint32_t(h - begin) < uint32_t(end - begin);
    }
  };
  static MMSOFTPOOL_BODY Rows cut(Rows rows, int32_t begin, int32_t end) {
    rows.begin = rows.begin > begin ? rows.begin : begin;
    rows.end = rows.end < end ? rows.end : end;
    rows.end = rows.end > rows.begin ? rows.end : rows.begin;
    return rows;
  }
  static MMSOFTPOOL_BODY Rows input_rows(const Arguments& a, Rows rows) {
    return cut(rows, 0, a.in_h);
  }
  static MMSOFTPOOL_BODY Rows output_rows(const Arguments& a, Rows rows) {
    return cut(rows, a.shift_h, a.shift_h + a.out_h);
  }

  // Gives finish(h, sums, means) the sums over K rows around each of `rows`, of what add(h, sums,
  // means) gives for the rows that are among `all`.
  template <int N, typename Add, typename Finish>
  static MMSOFTPOOL_BODY void walk(Rows rows, Rows all, const Add& add, const Finish& finish) {
    RowSums<K, N> all_sums, all_means;
    MMSOFTPOOL_NO_UNROLL
    for (int32_t turn = rows.begin - half; turn < rows.end + half; turn += K) {
      all_sums.start_turn();
      all_means.start_turn();
      MMSOFTPOOL_UNROLL
      for (int k = 0; k < K; ++k) {
        float sums[N] = {}, means[N] = {};
        if (all.has(turn + k)) {
          add(turn + k, sums, means);
        }
        all_sums.add(k, sums);
        all_means.add(k, means);
        if (rows.has(turn + k - half)) {
          finish(turn + k - half, sums, means);
        }
      }
    }
  }

  // Calls visit(h, j) for column j of the thread in each of `rows`.
  template <typename Visit>
  static MMSOFTPOOL_BODY void for_each_element(Rows rows, const Visit& visit) {
    MMSOFTPOOL_NO_UNROLL
    for (int32_t h = rows.begin; h < rows.end; ++h) {
      MMSOFTPOOL_NO_UNROLL
      for (int32_t j = 0; j < cols; ++j) {
        visit(h, j);
      }
    }
  }
  // The window in the middle of which is (h, w), in the way of generic.h. `input` is where column
  // `from` is.
  static MMSOFTPOOL_BODY Window<float> general_window(
      const Arguments& a, const T* input, int32_t from, int32_t h, int32_t w) {
    return window_of(
        a.indices, a.exponent, input - int64_t(from) * a.step,
        Position<int32_t>{0, 0, h - a.shift_h, w - a.shift_w});
  }

  static MMSOFTPOOL_BODY void forward(const Arguments& a, const T* input, T* output, uint32_t i) {
    const Place place(a, i);
    input += place.input;
    output += place.output;
    const Reference reference = own_reference(a, input, place);
    const Rows rows = output_rows(a, {place.begin, place.end});
    float checked = 0;
    walk<cols>(
        rows, input_rows(a, {rows.begin - half, rows.end + half}),
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          add_powers<true>(a, reference, input, h, place.w, sums, means);
        },
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          float middle[cols];
          if (sizeof(T) == 4) {
            read_input<0>(a, input, h, place.w, 0, middle);
          }
          MMSOFTPOOL_UNROLL
          for (int j = 0; j < cols; ++j) {
            float y = means[j] * reciprocal(sums[j]);
            if (sizeof(T) == 4) {
              // Within the rounding error of the middle input it is that: a window of one value.
              y = are_close(y, middle[j]) ? middle[j] : y;
            }
            means[j] = is_in_range(sums[j]) ? y : nan;
            if (has_output(a, place.w + j - j % whole_pack)) {
              check(means[j], checked);
            }
          }
          write_output(a, means, h, place.w, output);
        });
    if (checked != 0) {
      for_each_element(rows, [&](int32_t h, int32_t j) {
        if (has_output(a, place.w + j)) {
          T& y = find(output, a.out_row, h)[int64_t(j) * a.step];
          if (!is_finite(float(y))) {
            y = T(general_window(a, input, place.w, h, place.w + j).output());
          }
        }
      });
    }
  }

  static MMSOFTPOOL_BODY TwoSums
  two_sums(const Arguments& a, float grad_output, float sum, float mean) {
    const float per_sum = reciprocal(sum);
    const float scale = grad_output * per_sum, slope = a.slope * scale;
    const float first = scale - slope * (mean * per_sum);
    // A number below the normal ones lacks digits that a large power would show.
    const bool has_digits = (fabsf(scale) >= 0x1p-118f) | (grad_output == 0);
    return {is_in_range(sum) & has_digits ? first : nan, slope};
  }
  static MMSOFTPOOL_BODY float gradient(
      const Reference& reference, float x, float first, float second) {
    const float v = reference.logarithm(x);
    return exp2_or_zero(v) * std::fma(v, second, first);
  }
  static MMSOFTPOOL_BODY void write_gradients(
      const Arguments& a, const Reference& reference, const T* input, int32_t h, int32_t w,
      const float (&first)[cols], const float (&second)[cols], T* grad_input, float& checked) {
    float x[cols];
    read_input<0>(a, input, h, w, 0, x);
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < cols; ++j) {
      x[j] = gradient(reference, x[j], first[j], second[j]);
      if (has_input(a, w + j - j % whole_pack)) {
        check(x[j], checked);
      }
    }
    write_row<1, whole_pack>(
        x, find(grad_input, a.in_row, h), a.step, [&](int j) { return has_input(a, w + j); });
  }
  // Computes the gradients of a thread that are not finite again. share(x, h, w) is what window
  // (h, w) adds to that of the input x.
  template <typename Share>
  static MMSOFTPOOL_BODY void correct_gradients(
      const Arguments& a, const T* input, const Place& place, T* grad_input, const Share& share) {
    for_each_element({place.begin, place.end}, [&](int32_t h, int32_t j) {
      const int64_t at = int64_t(h) * a.in_row + int64_t(j) * a.step;
      if (place.w + j < a.in_w && !is_finite(float(grad_input[at]))) {
        const Range<int32_t> around_h = outputs_around(a.indices.height, h);
        const Range<int32_t> around_w = outputs_around(a.indices.width, place.w + j);
        float sum = 0;
        MMSOFTPOOL_NO_UNROLL
        for (int32_t oh = around_h.begin; oh < around_h.end; ++oh) {
          MMSOFTPOOL_NO_UNROLL
          for (int32_t ow = around_w.begin; ow < around_w.end; ++ow) {
            sum += share(float(input[at]), oh + a.shift_h, ow + a.shift_w);
          }
        }
        grad_input[at] = T(sum);
      }
    });
  }

  // The first step of the backward, for K > 3: writes a and b of each window to the first half of
  // the workspace; for a window out of range NaN and the maximum, and to the second half the other
  // two numbers of generic.h's backward.
  static MMSOFTPOOL_BODY void summarize(
      const Arguments& a, const T* grad_output, const T* input, float* workspace, uint32_t i) {
    const Place place(a, i);
    input += place.input;
    grad_output += place.output;
    TwoSums* const windows = reinterpret_cast<TwoSums*>(workspace) + place.output;
    const Reference reference = common_reference(a, input, place);
    const Rows rows = output_rows(a, {place.begin, place.end});
    float checked = 0;
    walk<cols>(
        rows, input_rows(a, {rows.begin - half, rows.end + half}),
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          add_powers<false>(a, reference, input, h, place.w, sums, means);
        },
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          float grad[cols];
          TwoSums numbers[cols];
          read_output<0>(a, grad_output, h, place.w, grad);
          MMSOFTPOOL_UNROLL
          for (int j = 0; j < cols; ++j) {
            numbers[j] = two_sums(a, grad[j], sums[j], means[j]);
            if (has_output(a, place.w + j - j % whole_pack)) {
              check(numbers[j].a, checked);
            }
          }
          write_output(a, numbers, h, place.w, windows);
        });
    if (checked != 0) {
      for_each_element(rows, [&](int32_t h, int32_t j) {
        if (has_output(a, place.w + j)) {
          TwoSums* const numbers = find(windows, a.out_row, h) + int64_t(j) * a.step;
          if (!is_finite(numbers->a)) {
            const Window<float> window = general_window(a, input, place.w, h, place.w + j);
            const float grad = float(find(grad_output, a.out_row, h)[int64_t(j) * a.step]);
            numbers->b = window.max;
            numbers[a.outputs] = {window.scale(grad), window.offset()};
          }
        }
      });
    }
  }
  // The second step.
  static MMSOFTPOOL_BODY void backward_from_windows(
      const Arguments& a, const float* workspace, const T* input, T* grad_input, uint32_t i) {
    const Place place(a, i);
    input += place.input;
    grad_input += place.input;
    const TwoSums* const windows = reinterpret_cast<const TwoSums*>(workspace) + place.output;
    const Reference reference = common_reference(a, input, place);
    float checked = 0;
    walk<cols>(
        {place.begin, place.end}, output_rows(a, {place.begin - half, place.end + half}),
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          TwoSums row[cols + K - 1];
          read_output<half>(a, windows, h, place.w, row);
          float first[cols + K - 1], second[cols + K - 1];
          MMSOFTPOOL_UNROLL
          for (int j = 0; j < cols + K - 1; ++j) {
            first[j] = row[j].a;
            second[j] = row[j].b;
          }
          add_columns<K>(first, sums);
          add_columns<K>(second, means);
        },
        [&](int32_t h, float (&sums)[cols], float (&means)[cols]) {
          write_gradients(a, reference, input, h, place.w, sums, means, grad_input, checked);
        });
    if (checked != 0) {
      correct_gradients(a, input, place, grad_input, [&](float x, int32_t h, int32_t w) {
        const TwoSums* const numbers = find(windows, a.out_row, h) + int64_t(w - place.w) * a.step;
        if (is_finite(numbers->a)) {
          return x == -std::numeric_limits<float>::infinity()
                     ? 0
                     : gradient(reference, x, numbers->a, numbers->b);
        }
        const TwoSums& rest = numbers[a.outputs];
        const Window<float> window(a.exponent, numbers->b);
        return rest.a * window.share(x, rest.b, a.indices.gradient);
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
    const Rows outputs = output_rows(a, {place.begin - 1, place.end + 1});
    float checked = 0;
    RowSums<3, cols> all_firsts, all_seconds;
    walk<cols + 2>(
        {place.begin - 1, place.end + 1}, input_rows(a, {outputs.begin - 1, outputs.end + 1}),
        [&](int32_t h, float (&sums)[cols + 2], float (&means)[cols + 2]) {
          add_powers<false>(a, reference, input, h, place.w, sums, means);
        },
        [&](int32_t h, float (&sums)[cols + 2], float (&means)[cols + 2]) {
          float first[cols] = {}, second[cols] = {};
          if (outputs.has(h)) {
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
            write_gradients(
                a, reference, input, h - 1, place.w, first, second, grad_input, checked);
          }
        });
    if (checked != 0) {
      correct_gradients(a, input, place, grad_input, [&](float x, int32_t h, int32_t w) {
        const Window<float> window = general_window(a, input, place.w, h, w);
        const float grad = float(find(grad_output, a.out_row, h)[int64_t(w - place.w) * a.step]);
        return window.scale(grad) * window.share(x, window.offset(), a.indices.gradient);
      });
    }
  }

  // `from`: the workspace or, for K = 3, the gradient of the output.
  template <typename From>
  static MMSOFTPOOL_BODY void backward(
      const Arguments& a, const From* from, const T* input, T* grad_input, uint32_t i) {
    if constexpr (two_steps) {
      backward_from_windows(a, from, input, grad_input, i);
    } else {
      backward_at_once(a, from, input, grad_input, i);
    }
  }
};

// Inside a plane a thread runs a copy that does not look for the edges.
template <typename T, int K, typename Run>
MMSOFTPOOL_BODY void with_way(
    Ring<T, K, Access::numbers> ring, const RingArguments& a, uint32_t i, const Run& run) {
  if (typename decltype(ring)::Place(a, i).is_inside(a)) {
    run(Ring<T, K, Access::inside>());
  } else {
    run(ring);
  }
}

}  // namespace mmsoftpool::cuda
