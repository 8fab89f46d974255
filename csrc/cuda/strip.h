// The pools of networks: 2 x 2 and 3 x 3 windows, many of them a thread.
#pragma once

#include "pack.h"

namespace mmsoftpool::cuda {

// Kernel K, stride S, Pad before the first row and column. A thread works on a strip that is Cols
// windows wide and walks down it, so that what two windows share is read once; `Channels` channels
// side by side, 1 if the tensor is contiguous. The strip is aligned in the input: it starts at
// column S Cols j and row S `rows` i.
//
// Packed (contiguous only): all rows are whole, aligned packs of S Cols numbers, and no window
// starts behind the last of them. See is_packed.
//
// alpha is not so small that e^(alpha (x - max)) of two finite numbers overflows: t, its exponent
// for the base 2, is then an exact 0 for the maximum, and below -150, where 2^t is 0, for -inf.
template <typename T, int K, int S, int Pad, int Cols, int Channels, bool Packed>
struct Strip {
  static_assert(S <= K && 2 * S >= K - 1 && Pad < K);
  static_assert(Channels == 1 || !Packed);

  static constexpr int columns = S * Cols;  // of the input
  // The windows that have taps in the strip, from the strip's first one on, and their columns.
  static constexpr int first = -((K - 1 - Pad) / S);
  static constexpr int windows = (columns - 1 + Pad) / S - first + 1;
  static constexpr int read_backward = S * (windows - 1) + K;
  static constexpr int read_forward = S * (Cols - 1) + K;
  static constexpr int own = Pad - first * S;  // the strip's first column among read_backward
  static constexpr float infinity = std::numeric_limits<float>::infinity();

  struct Arguments {
    int32_t in_h, in_w, out_h, out_w;
    int32_t inner_h;                // window rows whose taps are all inside, but for the first one
    int32_t step;                   // from a column to the next
    uint32_t packs, strips, parts;  // of an image or plane: packs of channels, strips, their parts
    int32_t rows;                   // windows that a thread walks down
    float log2e_alpha, per_log2e_alpha;
    float slope;                // d log(2^t) / dt for the exact gradient, 0 for the paper's
    int64_t in_size, out_size;  // from an image or plane to the next
    int64_t threads;

    // Strips for all of cover_h x cover_w windows.
    Arguments(const Pooling& pooling, int64_t rows, int64_t cover_h, int64_t cover_w)
        : in_h(static_cast<int32_t>(pooling.height.in)),
          in_w(static_cast<int32_t>(pooling.width.in)),
          out_h(static_cast<int32_t>(pooling.height.out)),
          out_w(static_cast<int32_t>(pooling.width.out)),
          step(Channels > 1 ? static_cast<int32_t>(pooling.channels) : 1),
          packs(Channels > 1 ? static_cast<uint32_t>(pooling.channels / Channels) : 1),
          strips(static_cast<uint32_t>((cover_w + Cols - 1) / Cols)),
          parts(static_cast<uint32_t>((cover_h + rows - 1) / rows)),
          rows(static_cast<int32_t>(rows)),
          log2e_alpha(make_exponent<float>(pooling).log2e_alpha_per_unit),
          per_log2e_alpha(1 / log2e_alpha),
          slope(pooling.gradient == Gradient::exact ? 0.6931472f : 0.0f),
          in_size(pooling.in_plane() * step),
          out_size(pooling.out_plane() * step),
          threads(pooling.planes() / Channels * strips * parts) {
      const int32_t room = in_h + Pad - K;
      const int32_t whole = room < 0 ? 0 : room / S + 1;
      inner_h = whole < out_h ? whole : out_h;
    }
  };

  // For the forward, strips over all outputs; for the backward, over all inputs. A thread walks
  // down `rows` windows, at most max_rows.
  static constexpr int64_t max_rows = 16;
  static Arguments forward_arguments(const Pooling& pooling, int64_t rows) {
    return Arguments(pooling, rows, pooling.height.out, pooling.width.out);
  }
  static Arguments backward_arguments(const Pooling& pooling, int64_t rows) {
    return Arguments(
        pooling, rows, (pooling.height.in + S - 1) / S, (pooling.width.in + S - 1) / S);
  }

  // Whether the threads, and the elements of a plane or image, can be counted in 32 bits.
  static bool fits(const Pooling& pooling) {
    const int64_t step = Channels > 1 ? pooling.channels : 1;
    constexpr int64_t beyond = 2 * columns + 2 * K;  // columns whose offsets are computed, not read
    return forward_arguments(pooling, max_rows).threads <= UINT32_MAX &&
           backward_arguments(pooling, max_rows).threads <= UINT32_MAX &&
           (pooling.in_plane() + beyond) * step <= INT32_MAX &&
           (pooling.out_plane() + beyond) * step <= INT32_MAX;
  }

  // Which strip thread i has: its first window, and where its plane (or its channels) begins.
  struct Place {
    int32_t oh, ow;
    int64_t input, output;
  };
  static MMSOFTPOOL_BODY Place find_place(const Arguments& a, uint32_t i) {
    Place place;
    uint32_t c = 0;
    if (Channels > 1) {
      c = i % a.packs * Channels;
      i /= a.packs;
    }
    place.ow = static_cast<int32_t>(i % a.strips) * Cols;
    i /= a.strips;
    place.oh = static_cast<int32_t>(i % a.parts) * a.rows;
    i /= a.parts;
    place.input = i * a.in_size + c;  // i is an image, or a plane if the tensor is contiguous
    place.output = i * a.out_size + c;
    return place;
  }

  template <int Count>
  static MMSOFTPOOL_BODY void read(const T* from, float* numbers) {
    const Pack<T, Count> pack = *reinterpret_cast<const Pack<T, Count>*>(from);
    unpack(pack, numbers);
  }
  template <int Count>
  static MMSOFTPOOL_BODY void read_if(
      bool inside, const T* from, const float (&outside)[Channels], float* numbers) {
    MMSOFTPOOL_UNROLL
    for (int i = 0; i < Count; ++i) {
      numbers[i] = outside[i % Channels];
    }
    if (inside) {
      read<Count>(from, numbers);
    }
  }
  template <int Count>
  static MMSOFTPOOL_BODY void write(const float* numbers, T* to) {
    Pack<T, Count> pack;
    pack_numbers<Count>(numbers, pack);
    *reinterpret_cast<Pack<T, Count>*>(to) = pack;
  }

  // Reads `Number` columns of row h from column w on; `outside` where there is none. The strip's
  // own begin at Own. Checked: the row may be outside, and columns too with the channels last.
  template <int Number, int Own, bool Checked>
  static MMSOFTPOOL_BODY void read_row(
      const Arguments& a, const T* plane, int32_t size_h, int32_t size_w, int32_t h, int32_t w,
      const float (&outside)[Channels], float (&row)[Number][Channels]) {
    if (Checked && uint32_t(h) >= uint32_t(size_h)) {
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < Number; ++j) {
        MMSOFTPOOL_UNROLL
        for (int c = 0; c < Channels; ++c) {
          row[j][c] = outside[c];
        }
      }
      return;
    }
    const int32_t from = (h * size_w + w) * a.step;
    if constexpr (Packed) {
      // Neighbours of the strip: none, one column or two, which are inside together.
      constexpr int right = Number - Own - columns;
      static_assert(Own <= 2 && right >= 0 && right <= 2);
      if constexpr (Own > 0) {
        read_if<Own>(w >= 0, plane + from, outside, &row[0][0]);
      }
      read<columns>(plane + from + Own, &row[Own][0]);
      if constexpr (right > 0) {
        read_if<right>(
            w + Own + columns < size_w, plane + from + Own + columns, outside,
            &row[Own + columns][0]);
      }
    } else {
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < Number; ++j) {
        const T* const column = plane + (from + j * a.step);
        if (Checked || Channels == 1) {
          read_if<Channels>(uint32_t(w + j) < uint32_t(size_w), column, outside, row[j]);
        } else {
          read<Channels>(column, row[j]);
        }
      }
    }
  }

  // The same of the input, for the maximum: -inf where there is none.
  template <int Number, int Own, bool Checked>
  static MMSOFTPOOL_BODY void read_input_row(
      const Arguments& a, const T* input, int32_t h, int32_t w, float (&row)[Number][Channels]) {
    float outside[Channels];
    MMSOFTPOOL_UNROLL
    for (int c = 0; c < Channels; ++c) {
      outside[c] = -infinity;
    }
    read_row<Number, Own, Checked>(a, input, a.in_h, a.in_w, h, w, outside, row);
  }

  // Moves what a window row shares with the next one to its place there.
  template <int Number>
  static MMSOFTPOOL_BODY void slide(float (&rows)[K][Number][Channels]) {
    MMSOFTPOOL_UNROLL
    for (int k = S; k < K; ++k) {
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < Number; ++j) {
        MMSOFTPOOL_UNROLL
        for (int c = 0; c < Channels; ++c) {
          rows[k - S][j][c] = rows[k][j][c];
        }
      }
    }
  }

  // The window whose columns start at `column`: t of each tap, 2^t, and their sums. `highest` has
  // the maxima of the columns.
  struct StripWindow {
    float max, sum, mean;
    float t[K * K], weight[K * K];

    template <int Number>
    MMSOFTPOOL_BODY StripWindow(
        const Arguments& a, const float (&rows)[K][Number][Channels],
        const float (&highest)[Number][Channels], int column, int c) {
      max = highest[column][c];
      MMSOFTPOOL_UNROLL
      for (int j = 1; j < K; ++j) {
        max = fmaxf(max, highest[column + j][c]);
      }
      // In a window of -inf alone x - max must not be -inf + inf.
      const float finite = fmaxf(max, std::numeric_limits<float>::lowest());
      MMSOFTPOOL_UNROLL
      for (int k = 0; k < K * K; ++k) {
        t[k] = max_or_nan((rows[k / K][column + k % K][c] - finite) * a.log2e_alpha, -150.0f);
        weight[k] = exp2_or_zero(t[k]);
        sum = k == 0 ? weight[k] : sum + weight[k];
        mean = k == 0 ? weight[k] * t[k] : mean + weight[k] * t[k];
      }
    }
    // 1 / sum. The sum is at least 1, or 0 for nothing but -inf: then any number will do, since
    // all weights are 0; or NaN, which the mean is too.
    MMSOFTPOOL_BODY float per_sum() const { return reciprocal(fmaxf(sum, 0.5f)); }
  };

  template <int Number>
  static MMSOFTPOOL_BODY void find_highest(
      const float (&rows)[K][Number][Channels], float (&highest)[Number][Channels]) {
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Number; ++j) {
      MMSOFTPOOL_UNROLL
      for (int c = 0; c < Channels; ++c) {
        highest[j][c] = rows[0][j][c];
        MMSOFTPOOL_UNROLL
        for (int k = 1; k < K; ++k) {
          highest[j][c] = fmaxf(highest[j][c], rows[k][j][c]);
        }
      }
    }
  }

  template <bool Checked>
  static MMSOFTPOOL_BODY void write_row(
      const Arguments& a, int32_t size_w, const float (&result)[Cols][Channels], T* output,
      int32_t oh, int32_t ow) {
    T* const to = output + (oh * size_w + ow) * a.step;
    constexpr bool out_packed = Packed && !(K > S && Pad == 0);  // else rows are a window shorter
    if (out_packed) {
      write<Cols>(&result[0][0], to);
    } else {
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < Cols; ++j) {
        if ((Channels > 1 && !Checked) || ow + j < size_w) {
          write<Channels>(result[j], to + j * a.step);
        }
      }
    }
  }

  // One row of windows of the forward. `rows` has what it shares with the row before.
  template <bool Checked>
  static MMSOFTPOOL_BODY void forward_row(
      const Arguments& a, const T* input, T* output, int32_t oh, int32_t ow,
      float (&rows)[K][read_forward][Channels]) {
    MMSOFTPOOL_UNROLL
    for (int k = K - S; k < K; ++k) {
      read_input_row<read_forward, Pad, Checked>(a, input, S * oh - Pad + k, S * ow - Pad, rows[k]);
    }
    float highest[read_forward][Channels];
    find_highest(rows, highest);
    float result[Cols][Channels];
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Cols; ++j) {
      MMSOFTPOOL_UNROLL
      for (int c = 0; c < Channels; ++c) {
        const StripWindow window(a, rows, highest, S * j, c);
        result[j][c] = window.max + window.mean * window.per_sum() * a.per_log2e_alpha;
      }
    }
    write_row<Checked>(a, a.out_w, result, output, oh, ow);
    slide(rows);
  }

  static MMSOFTPOOL_BODY void forward(const Arguments& a, const T* input, T* output, uint32_t i) {
    const Place place = find_place(a, i);
    input += place.input;
    output += place.output;
    const int32_t w = S * place.ow - Pad;
    const int32_t end = place.oh + a.rows < a.out_h ? place.oh + a.rows : a.out_h;
    // From row `inner` on there are checks; with the channels last, where all threads of a warp
    // have the same column or nearly so, everywhere in strips at the edge.
    int32_t inner = a.inner_h < end ? a.inner_h : end;
    if (Channels > 1 && (w < 0 || w + read_forward > a.in_w || place.ow + Cols > a.out_w)) {
      inner = 0;
    }
    float rows[K][read_forward][Channels];
    MMSOFTPOOL_UNROLL
    for (int k = 0; k < K - S; ++k) {
      read_input_row<read_forward, Pad, true>(a, input, S * place.oh - Pad + k, w, rows[k]);
    }
    int32_t oh = place.oh;
    while (oh < end) {
      for (; oh < inner; ++oh) {
        forward_row<false>(a, input, output, oh, place.ow, rows);
      }
      if (oh < end) {
        forward_row<true>(a, input, output, oh, place.ow, rows);
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
      int32_t ow, int32_t begin, int32_t end, float (&rows)[K][read_backward][Channels],
      float (&grads)[K][read_backward][Channels]) {
    const int32_t h = S * oh - Pad;
    MMSOFTPOOL_UNROLL
    for (int k = K - S; k < K; ++k) {
      read_input_row<read_backward, own, Checked>(a, input, h + k, S * (ow + first) - Pad, rows[k]);
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < read_backward; ++j) {
        MMSOFTPOOL_UNROLL
        for (int c = 0; c < Channels; ++c) {
          grads[k][j][c] = 0;
        }
      }
    }
    if (!Checked || uint32_t(oh) < uint32_t(a.out_h)) {
      const T* const from = grad_output + (oh * a.out_w + ow) * a.step;
      float highest[read_backward][Channels];
      find_highest(rows, highest);
      constexpr bool out_packed = Packed && !(K > S && Pad == 0);
      float own_grads[out_packed ? Cols : 1];
      if constexpr (out_packed) {
        read<Cols>(from, own_grads);
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
            read<Channels>(from + column * a.step, grad);
          }
          MMSOFTPOOL_UNROLL
          for (int c = 0; c < Channels; ++c) {
            const StripWindow window(a, rows, highest, S * j, c);
            const float per_sum = window.per_sum();
            const float scale = grad[c] * per_sum;
            // g w (1 + alpha (x - y)), or g w, as weight * (factor * t + summand)
            const float factor = scale * a.slope;
            const float summand = scale - factor * (window.mean * per_sum);
            MMSOFTPOOL_UNROLL
            for (int k = 0; k < K * K; ++k) {
              grads[k / K][S * j + k % K][c] += window.weight[k] * (factor * window.t[k] + summand);
            }
          }
        }
      }
    }
    MMSOFTPOOL_UNROLL
    for (int k = 0; k < S; ++k) {
      if (h + k >= begin && h + k < end) {
        T* const to = grad_input + ((h + k) * a.in_w + S * ow) * a.step;
        if (Packed) {
          write<Packed ? columns : 1>(&grads[k][own][0], to);
        } else {
          MMSOFTPOOL_UNROLL
          for (int j = 0; j < columns; ++j) {
            if ((Channels > 1 && !Checked) || S * ow + j < a.in_w) {
              write<Channels>(grads[k][own + j], to + j * a.step);
            }
          }
        }
      }
    }
    slide(rows);
    slide(grads);
  }

  // The thread writes the inputs of its strip: columns [S ow, S ow + S Cols) and as many rows. The
  // windows at the strip's edge are computed by both neighbours.
  static MMSOFTPOOL_BODY void backward(
      const Arguments& a, const T* grad_output, const T* input, T* grad_input, uint32_t i) {
    const Place place = find_place(a, i);
    grad_output += place.output;
    input += place.input;
    grad_input += place.input;
    const int32_t w = S * (place.ow + first) - Pad;
    const int32_t begin = S * place.oh;
    const int32_t end = begin + S * a.rows < a.in_h ? begin + S * a.rows : a.in_h;
    const int32_t last = (end - 1 + Pad) / S;  // the last row of windows with taps in the strip
    int32_t inner = a.inner_h < last + 1 ? a.inner_h : last + 1;
    if (Channels > 1 && (w < 0 || w + read_backward > a.in_w || place.ow + first < 0 ||
                         place.ow + first + windows > a.out_w)) {
      inner = 0;
    }
    int32_t oh = place.oh + first;
    float rows[K][read_backward][Channels];
    float grads[K][read_backward][Channels];
    MMSOFTPOOL_UNROLL
    for (int k = 0; k < K - S; ++k) {
      read_input_row<read_backward, own, true>(a, input, S * oh - Pad + k, w, rows[k]);
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < read_backward; ++j) {
        MMSOFTPOOL_UNROLL
        for (int c = 0; c < Channels; ++c) {
          grads[k][j][c] = 0;
        }
      }
    }
    while (oh <= last) {
      if (oh >= 0) {
        for (; oh < inner; ++oh) {
          backward_row<false>(
              a, grad_output, input, grad_input, oh, place.ow, begin, end, rows, grads);
        }
      }
      if (oh <= last) {
        backward_row<true>(
            a, grad_output, input, grad_input, oh, place.ow, begin, end, rows, grads);
        ++oh;
      }
    }
  }
};

}  // namespace mmsoftpool::cuda
