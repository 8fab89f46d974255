// The pools of networks: 2 x 2 and 3 x 3 windows of stride 2, many of them a thread.
#pragma once

#include "walk.h"

namespace mmsoftpool::cuda {

struct StripArguments : WalkArguments {
  int32_t inner_h;  // window rows whose taps are all inside, but for the first one
};

// Kernel K, stride S, Pad before the first row and column. A thread works on a strip that is Cols
// windows wide and walks down it, so that what two windows share is read once; `Channels` channels
// side by side, 1 if the tensor is contiguous. The strip is aligned in the input: it starts at
// column S Cols j and row S `rows` i.
//
// Packed (contiguous only): all rows are whole, aligned packs of S Cols numbers, and no window
// starts behind the last of them. See run_strip.
//
// alpha is not so small that e^(alpha (x - max)) of two finite numbers overflows: t, its exponent
// for the base 2, is then an exact 0 for the maximum, and below -150, where 2^t is 0, for -inf.
template <typename T, int K, int S, int Pad, int Cols, int Channels, bool Packed>
struct Strip {
  static_assert(S <= K && 2 * S >= K - 1 && Pad < K);
  static_assert(Channels == 1 || !Packed);

  using Arguments = StripArguments;
  using Int = uint32_t;
  static constexpr bool two_steps = false, has_slices = false;
  static constexpr bool out_packed =
      Packed && !(K > S && Pad == 0);       // else rows are a window short
  static constexpr int columns = S * Cols;  // of the input
  // The windows that have taps in the strip, from the strip's first one on, and their columns.
  static constexpr int first = -((K - 1 - Pad) / S);
  static constexpr int windows = (columns - 1 + Pad) / S - first + 1;
  static constexpr int read_backward = S * (windows - 1) + K;
  static constexpr int read_forward = S * (Cols - 1) + K;
  static constexpr int own = Pad - first * S;  // the strip's first column among read_backward

  // Strips over cover_h x cover_w windows. A thread walks down `rows` of them; 0 for a number that
  // suits the GPU.
  static Arguments arguments(
      const Pooling& pooling, int64_t rows, int64_t cover_h, int64_t cover_w) {
    const int64_t strips = (cover_w + Cols - 1) / Cols;
    if (rows == 0) {
      rows = choose_rows(pooling.planes() / Channels * strips, cover_h, 1, 16, 1 << 19);
    }
    Arguments a{WalkArguments(pooling, Channels, strips, cover_h, rows), 0};
    const int32_t room = a.in_h + Pad - K;
    a.inner_h = std::min(room < 0 ? 0 : room / S + 1, a.out_h);
    return a;
  }
  // For the forward, strips over all outputs; for the backward, over all inputs.
  static Arguments forward_arguments(const Pooling& pooling, int64_t rows = 0) {
    return arguments(pooling, rows, pooling.height.out, pooling.width.out);
  }
  static Arguments backward_arguments(const Pooling& pooling, int64_t rows = 0) {
    return arguments(
        pooling, rows, (pooling.height.in + S - 1) / S, (pooling.width.in + S - 1) / S);
  }

  // Whether the threads, and the elements of a plane or image, can be counted in 32 bits.
  static bool fits(const Pooling& pooling) {
    const int64_t step = Channels > 1 ? pooling.channels : 1;
    constexpr int64_t beyond = 2 * columns + 2 * K;  // columns whose offsets are computed, not read
    return forward_arguments(pooling).threads <= UINT32_MAX &&
           backward_arguments(pooling).threads <= UINT32_MAX &&
           (pooling.in_plane() + beyond) * step <= INT32_MAX &&
           (pooling.out_plane() + beyond) * step <= INT32_MAX;
  }

  // Reads row h of the input, -inf where there is none: `Numbers` numbers, columns times channels.
  // The strip's own begin at column w, the `Before`-th. Checked: the row may be outside, and
  // columns too with the channels last.
  template <int Before, bool Checked, int Numbers>
  static MMSOFTPOOL_BODY void read_input(
      const Arguments& a, const T* input, int32_t h, int32_t w, float (&row)[Numbers]) {
    constexpr float outside = -std::numeric_limits<float>::infinity();
    if (Checked && uint32_t(h) >= uint32_t(a.in_h)) {
      MMSOFTPOOL_UNROLL
      for (float& number : row) {
        number = outside;
      }
      return;
    }
    read_row<
        Before, columns, Numbers / Channels - Before - columns, Channels, Packed ? columns : 1>(
        input + (h * a.in_w + w) * a.step, a.step, outside,
        [&](int j) { return has<Checked>(w, j, a.in_w); }, row);
  }
  // Whether column j of a strip that begins at w is there.
  template <bool Checked>
  static MMSOFTPOOL_BODY bool has(int32_t w, int j, int32_t size_w) {
    return (Channels > 1 && !Checked) || uint32_t(w + j) < uint32_t(size_w);
  }
  template <bool AsPack, bool Checked, int Numbers>
  static MMSOFTPOOL_BODY void write_columns(
      const Arguments& a, const float (&row)[Numbers], T* to, int32_t w, int32_t size_w) {
    write_row<Channels, AsPack ? Numbers : 1>(
        row, to, a.step, [&](int j) { return has<Checked>(w, j, size_w); });
  }
  // Moves what a window row shares with the next one to its place there.
  template <int Numbers>
  static MMSOFTPOOL_BODY void slide(float (&rows)[K][Numbers]) {
    MMSOFTPOOL_UNROLL
    for (int k = S; k < K; ++k) {
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < Numbers; ++j) {
        rows[k - S][j] = rows[k][j];
      }
    }
  }
  template <int Numbers>
  static MMSOFTPOOL_BODY void find_highest(
      const float (&rows)[K][Numbers], float (&highest)[Numbers]) {
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Numbers; ++j) {
      highest[j] = rows[0][j];
      MMSOFTPOOL_UNROLL
      for (int k = 1; k < K; ++k) {
        highest[j] = fmaxf(highest[j], rows[k][j]);
      }
    }
  }

  // The window whose columns are every `Channels`-th number from `begin` on: t of each tap, 2^t,
  // and their sums. `highest` has the maxima of the columns.
  struct StripWindow {
    float max, sum, mean;
    float t[K * K], weight[K * K];

    template <int Numbers>
    MMSOFTPOOL_BODY StripWindow(
        const Arguments& a, const float (&rows)[K][Numbers], const float (&highest)[Numbers],
        int begin) {
      max = highest[begin];
      MMSOFTPOOL_UNROLL
      for (int j = 1; j < K; ++j) {
        max = fmaxf(max, highest[begin + j * Channels]);
      }
      // In a window of -inf alone x - max must not be -inf + inf.
      const float finite = fmaxf(max, std::numeric_limits<float>::lowest());
      MMSOFTPOOL_UNROLL
      for (int k = 0; k < K * K; ++k) {
        const float x = rows[k / K][begin + k % K * Channels];
        t[k] = max_or_nan((x - finite) * a.log2e_alpha, -150.0f);
        weight[k] = exp2_or_zero(t[k]);
        sum = k == 0 ? weight[k] : sum + weight[k];
        mean = k == 0 ? weight[k] * t[k] : mean + weight[k] * t[k];
      }
    }
    // 1 / sum. The sum is at least 1, or 0 for nothing but -inf: then any number will do, since
    // all weights are 0; or NaN, which the mean is too.
    MMSOFTPOOL_BODY float per_sum() const { return reciprocal(fmaxf(sum, 0.5f)); }
  };

  // One row of windows of the forward. `rows` has what it shares with the row before.
  template <bool Checked>
  static MMSOFTPOOL_BODY void forward_row(
      const Arguments& a, const T* input, T* output, int32_t oh, int32_t ow,
      float (&rows)[K][read_forward * Channels]) {
    MMSOFTPOOL_UNROLL
    for (int k = K - S; k < K; ++k) {
      read_input<Pad, Checked>(a, input, S * oh - Pad + k, S * ow, rows[k]);
    }
    float highest[read_forward * Channels], result[Cols * Channels];
    find_highest(rows, highest);
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Cols * Channels; ++j) {
      const StripWindow window(a, rows, highest, S * Channels * (j / Channels) + j % Channels);
      result[j] = window.max + window.mean * window.per_sum() * a.per_log2e_alpha;
    }
    write_columns<out_packed, Checked>(
        a, result, output + (oh * a.out_w + ow) * a.step, ow, a.out_w);
    slide(rows);
  }

  static MMSOFTPOOL_BODY void forward(const Arguments& a, const T* input, T* output, uint32_t i) {
    const auto place = a.find_place(i, Channels);
    const int32_t ow = place.strip * Cols, w = S * ow - Pad;
    input += place.input;
    output += place.output;
    const int32_t end = place.row + a.rows < a.out_h ? place.row + a.rows : a.out_h;
    // From row `inner` on there are checks; with the channels last, where all threads of a warp
    // have the same column or nearly so, everywhere in strips at the edge.
    int32_t inner = a.inner_h < end ? a.inner_h : end;
    if (Channels > 1 && (w < 0 || w + read_forward > a.in_w || ow + Cols > a.out_w)) {
      inner = 0;
    }
    float rows[K][read_forward * Channels];
    MMSOFTPOOL_UNROLL
    for (int k = 0; k < K - S; ++k) {
      read_input<Pad, true>(a, input, S * place.row - Pad + k, S * ow, rows[k]);
    }
    int32_t oh = place.row;
    while (oh < end) {
      for (; oh < inner; ++oh) {
        forward_row<false>(a, input, output, oh, ow, rows);
      }
      if (oh < end) {
        forward_row<true>(a, input, output, oh, ow, rows);
        ++oh;
      }
    }
  }

  // One row of windows of the backward. `rows` and `grads` have what it shares with the row before;
  // of its K rows of gradients the first S are complete then, and written if they are among the
  // strip's rows [begin, end).
  template <bool Checked>
  static MMSOFTPOOL_BODY void backward_row(
      const Arguments& a, const T* grad_output, const T* input, T* grad_input, int32_t oh,
      int32_t ow, int32_t begin, int32_t end, float (&rows)[K][read_backward * Channels],
      float (&grads)[K][read_backward * Channels]) {
    const int32_t h = S * oh - Pad;
    MMSOFTPOOL_UNROLL
    for (int k = K - S; k < K; ++k) {
      read_input<own, Checked>(a, input, h + k, S * ow, rows[k]);
      MMSOFTPOOL_UNROLL
      for (float& grad : grads[k]) {
        grad = 0;
      }
    }
    if (!Checked || uint32_t(oh) < uint32_t(a.out_h)) {
      const T* const from = grad_output + (oh * a.out_w + ow) * a.step;
      float highest[read_backward * Channels];
      find_highest(rows, highest);
      float own_grads[out_packed ? Cols : 1];
      if constexpr (out_packed) {
        read_if<Cols>(true, from, 0.0f, own_grads);
      }
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < windows; ++j) {
        const int column = first + j;  // from ow on
        const bool is_own = column >= 0 && column < Cols;
        const bool certain = Channels > 1 ? !Checked : out_packed && is_own;
        if (certain || uint32_t(ow + column) < uint32_t(a.out_w)) {
          float grad[Channels];
          if (out_packed && is_own) {
            grad[0] = own_grads[out_packed && is_own ? column : 0];
          } else {
            read_if<Channels>(true, from + column * a.step, 0.0f, grad);
          }
          MMSOFTPOOL_UNROLL
          for (int c = 0; c < Channels; ++c) {
            const int at = S * j * Channels + c;
            const StripWindow window(a, rows, highest, at);
            const float per_sum = window.per_sum();
            const float scale = grad[c] * per_sum;
            // g w (1 + alpha (x - y)), or g w, as weight * (factor * t + summand)
            const float factor = scale * a.slope;
            const float summand = scale - factor * (window.mean * per_sum);
            MMSOFTPOOL_UNROLL
            for (int k = 0; k < K * K; ++k) {
              grads[k / K][at + k % K * Channels] +=
                  window.weight[k] * (factor * window.t[k] + summand);
            }
          }
        }
      }
    }
    MMSOFTPOOL_UNROLL
    for (int k = 0; k < S; ++k) {
      if (h + k >= begin && h + k < end) {
        float row[columns * Channels];
        MMSOFTPOOL_UNROLL
        for (int j = 0; j < columns * Channels; ++j) {
          row[j] = grads[k][own * Channels + j];
        }
        T* const to = grad_input + ((h + k) * a.in_w + S * ow) * a.step;
        write_columns<Packed, Checked>(a, row, to, S * ow, a.in_w);
      }
    }
    slide(rows);
    slide(grads);
  }

  // The thread writes the inputs of its strip: columns [S ow, S ow + S Cols) and as many rows. The
  // windows at the strip's edge are computed by both neighbours.
  static MMSOFTPOOL_BODY void backward(
      const Arguments& a, const T* grad_output, const T* input, T* grad_input, uint32_t i) {
    const auto place = a.find_place(i, Channels);
    const int32_t ow = place.strip * Cols, w = S * (ow + first) - Pad;
    grad_output += place.output;
    input += place.input;
    grad_input += place.input;
    const int32_t begin = S * place.row;
    const int32_t end = begin + S * a.rows < a.in_h ? begin + S * a.rows : a.in_h;
    const int32_t last = (end - 1 + Pad) / S;  // the last row of windows with taps in the strip
    int32_t inner = a.inner_h < last + 1 ? a.inner_h : last + 1;
    if (Channels > 1 &&
        (w < 0 || w + read_backward > a.in_w || ow + first < 0 || ow + first + windows > a.out_w)) {
      inner = 0;
    }
    int32_t oh = place.row + first;
    float rows[K][read_backward * Channels], grads[K][read_backward * Channels] = {};
    MMSOFTPOOL_UNROLL
    for (int k = 0; k < K - S; ++k) {
      read_input<own, true>(a, input, S * oh - Pad + k, S * ow, rows[k]);
    }
    while (oh <= last) {
      if (oh >= 0) {
        for (; oh < inner; ++oh) {
          backward_row<false>(a, grad_output, input, grad_input, oh, ow, begin, end, rows, grads);
        }
      }
      if (oh <= last) {
        backward_row<true>(a, grad_output, input, grad_input, oh, ow, begin, end, rows, grads);
        ++oh;
      }
    }
  }
};

}  // namespace mmsoftpool::cuda
