// The pools of networks: 2 x 2 and 3 x 3 windows of stride 2, many of them a thread.
#pragma once

#include "window.h"

namespace mmsoftpool::cuda {

// `Count` neighbouring numbers that one instruction moves: they are aligned to their whole size.
template <typename T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T values[Count];
};

// Kernel K, stride 2, Pad before the first row and column. A thread works on a strip that is Cols
// windows wide and walks down it, so that what two windows share is read once; `Channels` channels
// side by side, 1 if the tensor is contiguous. The strip is aligned in the input: it starts at
// column 2 Cols j and row 2 `rows` i.
template <typename T, int K, int Pad, int Cols, int Channels>
struct Strip {
  static_assert((K == 2 && Pad == 0) || (K == 3 && Pad <= 1));
  static_assert(Cols == 1 || Channels == 1);
  using A = Compute<T>;

  struct Arguments {
    int32_t in_h, in_w, out_h, out_w;
    int32_t step;                   // from a column to the next
    uint32_t packs, strips, parts;  // of an image or plane: packs of channels, strips, their parts
    int32_t rows;                   // windows that a thread walks down
    bool packed;                    // whether rows of packs are aligned (contiguous only)
    bool exact;
    Exponent<A> exponent;
    int64_t in_size, out_size;  // from an image or plane to the next
    int64_t threads;

    // Strips for all of cover_h x cover_w windows.
    Arguments(const Pooling& pooling, int64_t rows, int64_t cover_h, int64_t cover_w, bool packed)
        : in_h(static_cast<int32_t>(pooling.height.in)),
          in_w(static_cast<int32_t>(pooling.width.in)),
          out_h(static_cast<int32_t>(pooling.height.out)),
          out_w(static_cast<int32_t>(pooling.width.out)),
          step(Channels > 1 ? static_cast<int32_t>(pooling.channels) : 1),
          packs(Channels > 1 ? static_cast<uint32_t>(pooling.channels / Channels) : 1),
          strips(static_cast<uint32_t>((cover_w + Cols - 1) / Cols)),
          parts(static_cast<uint32_t>((cover_h + rows - 1) / rows)),
          rows(static_cast<int32_t>(rows)),
          packed(packed),
          exact(pooling.gradient == Gradient::exact),
          exponent(make_exponent<A>(pooling)),
          in_size(pooling.in_plane() * step),
          out_size(pooling.out_plane() * step),
          threads(pooling.planes() / Channels * strips * parts) {}
  };

  // For the forward, strips over all outputs; for the backward, over all inputs. A thread walks
  // down `rows` windows, at most max_rows.
  static constexpr int64_t max_rows = 16;
  static Arguments forward_arguments(const Pooling& pooling, int64_t rows, bool packed) {
    return Arguments(pooling, rows, pooling.height.out, pooling.width.out, packed);
  }
  static Arguments backward_arguments(const Pooling& pooling, int64_t rows, bool packed) {
    return Arguments(
        pooling, rows, (pooling.height.in + 1) / 2, (pooling.width.in + 1) / 2, packed);
  }

  // Whether the threads can be counted in 32 bits.
  static bool fits(const Pooling& pooling) {
    return forward_arguments(pooling, max_rows, false).threads <= UINT32_MAX &&
           backward_arguments(pooling, max_rows, false).threads <= UINT32_MAX;
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

  // Reads `Number` columns of row h from column w on; -inf where there is none. Columns
  // [Aligned, Aligned + 2 Cols) of them are one pack of the tensor.
  template <int Number, int Aligned>
  static MMSOFTPOOL_BODY void read_row(
      const Arguments& a, const T* plane, int32_t h, int32_t w, A (&row)[Number][Channels]) {
    if (h < 0 || h >= a.in_h) {
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < Number; ++j) {
        MMSOFTPOOL_UNROLL
        for (int c = 0; c < Channels; ++c) {
          row[j][c] = -std::numeric_limits<A>::infinity();
        }
      }
      return;
    }
    const T* const from = plane + int64_t(h) * a.in_w * a.step;
    constexpr bool has_pack = Channels == 1 && Aligned >= 0;
    const bool pack = has_pack && a.packed && w + Aligned + 2 * Cols <= a.in_w;
    if (pack) {
      const auto p = *reinterpret_cast<const Pack<T, 2 * Cols>*>(from + w + Aligned);
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < 2 * Cols; ++j) {
        row[(has_pack ? Aligned : 0) + j][0] = A(p.values[j]);
      }
    }
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Number; ++j) {
      if (pack && j >= Aligned && j < Aligned + 2 * Cols) {
        continue;
      }
      const bool inside = w + j >= 0 && w + j < a.in_w;
      Pack<T, Channels> p;
      if (inside) {
        p = *reinterpret_cast<const Pack<T, Channels>*>(from + int64_t(w + j) * a.step);
      }
      MMSOFTPOOL_UNROLL
      for (int c = 0; c < Channels; ++c) {
        row[j][c] = inside ? A(p.values[c]) : -std::numeric_limits<A>::infinity();
      }
    }
  }

  // The window whose columns start at `column` of the rows.
  template <int Number>
  static MMSOFTPOOL_BODY Window<A> window(
      const Arguments& a, const A (&rows)[K][Number][Channels], int column, int c) {
    A max = Window<A>::lowest;
    MMSOFTPOOL_UNROLL
    for (int k = 0; k < K * K; ++k) {
      max = Window<A>::update_max(max, rows[k / K][column + k % K][c]);
    }
    Window<A> result(a.exponent, max * a.exponent.unit);
    MMSOFTPOOL_UNROLL
    for (int k = 0; k < K * K; ++k) {
      result.add(rows[k / K][column + k % K][c]);
    }
    return result;
  }

  // Moves what a window row shares with the next one to its place there.
  template <int Number>
  static MMSOFTPOOL_BODY void slide(A (&rows)[K][Number][Channels]) {
    if (K == 3) {
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < Number; ++j) {
        MMSOFTPOOL_UNROLL
        for (int c = 0; c < Channels; ++c) {
          rows[0][j][c] = rows[K - 1][j][c];
        }
      }
    }
  }

  static MMSOFTPOOL_BODY void forward(const Arguments& a, const T* input, T* output, uint32_t i) {
    const Place place = find_place(a, i);
    constexpr int number = 2 * (Cols - 1) + K;
    const int32_t w = 2 * place.ow - Pad;
    const int32_t end = place.oh + a.rows < a.out_h ? place.oh + a.rows : a.out_h;
    A rows[K][number][Channels];
    if (K == 3) {
      read_row<number, Pad>(a, input + place.input, 2 * place.oh - Pad, w, rows[0]);
    }
    for (int32_t oh = place.oh; oh < end; ++oh) {
      MMSOFTPOOL_UNROLL
      for (int k = K - 2; k < K; ++k) {
        read_row<number, Pad>(a, input + place.input, 2 * oh - Pad + k, w, rows[k]);
      }
      T* const to = output + place.output + (int64_t(oh) * a.out_w + place.ow) * a.step;
      Pack<T, Cols * Channels> result;
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < Cols; ++j) {
        MMSOFTPOOL_UNROLL
        for (int c = 0; c < Channels; ++c) {
          result.values[j * Channels + c] = T(window(a, rows, 2 * j, c).output());
        }
      }
      if (Channels > 1 || (a.packed && a.out_w % Cols == 0)) {
        *reinterpret_cast<Pack<T, Cols * Channels>*>(to) = result;
      } else {
        MMSOFTPOOL_UNROLL
        for (int j = 0; j < Cols; ++j) {
          if (place.ow + j < a.out_w) {
            to[j] = result.values[j];
          }
        }
      }
      slide(rows);
    }
  }

  // The thread writes the inputs of its strip: columns [2 ow, 2 ow + 2 Cols) and as many rows. The
  // windows at the strip's edge are computed by both neighbours.
  static MMSOFTPOOL_BODY void backward(
      const Arguments& a, const T* grad_output, const T* input, T* grad_input, uint32_t i) {
    const Place place = find_place(a, i);
    constexpr int halo = K == 3 ? 1 : 0;         // windows beyond the strip, on one side
    constexpr int first = K == 3 ? Pad - 1 : 0;  // from the strip's first window on
    constexpr int windows = Cols + halo;
    constexpr int number = 2 * (windows - 1) + K;
    constexpr int own = K == 3 ? 2 - Pad : 0;  // the strip's first column among those read
    const int32_t w = 2 * (place.ow + first) - Pad;
    const int32_t row_begin = 2 * place.oh;
    const int32_t row_end = row_begin + 2 * a.rows < a.in_h ? row_begin + 2 * a.rows : a.in_h;

    A rows[K][number][Channels];
    A grads[K][number][Channels];
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < number; ++j) {
      MMSOFTPOOL_UNROLL
      for (int c = 0; c < Channels; ++c) {
        grads[0][j][c] = 0;
      }
    }
    const int32_t oh_begin = place.oh + first;
    if (K == 3) {
      read_row<number, own>(a, input + place.input, 2 * oh_begin - Pad, w, rows[0]);
    }
    for (int32_t oh = oh_begin; 2 * oh - Pad < row_end; ++oh) {
      MMSOFTPOOL_UNROLL
      for (int k = K - 2; k < K; ++k) {
        read_row<number, own>(a, input + place.input, 2 * oh - Pad + k, w, rows[k]);
      }
      MMSOFTPOOL_UNROLL
      for (int k = K == 3 ? 1 : 0; k < K; ++k) {
        MMSOFTPOOL_UNROLL
        for (int j = 0; j < number; ++j) {
          MMSOFTPOOL_UNROLL
          for (int c = 0; c < Channels; ++c) {
            grads[k][j][c] = 0;
          }
        }
      }
      const bool row_inside = oh >= 0 && oh < a.out_h;
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < windows; ++j) {
        const int32_t ow = place.ow + first + j;
        if (row_inside && ow >= 0 && ow < a.out_w) {
          const T* const from = grad_output + place.output + (int64_t(oh) * a.out_w + ow) * a.step;
          const auto grad = *reinterpret_cast<const Pack<T, Channels>*>(from);
          MMSOFTPOOL_UNROLL
          for (int c = 0; c < Channels; ++c) {
            const Window<A> current = window(a, rows, 2 * j, c);
            const A scale = current.scale(A(grad.values[c]));
            const A offset = current.offset();
            MMSOFTPOOL_UNROLL
            for (int k = 0; k < K * K; ++k) {
              const A d = current.difference(rows[k / K][2 * j + k % K][c]);
              const A slope = a.exact ? current.slope(d, offset) : A(1);
              grads[k / K][2 * j + k % K][c] += scale * current.weight(d) * slope;
            }
          }
        }
      }
      // The first two rows are complete; the next windows add to the third one.
      MMSOFTPOOL_UNROLL
      for (int k = 0; k < 2; ++k) {
        const int32_t h = 2 * oh - Pad + k;
        if (h >= row_begin && h < row_end) {
          T* const to = grad_input + place.input + (int64_t(h) * a.in_w + 2 * place.ow) * a.step;
          write_row<number, own>(a, to, 2 * place.ow, grads[k]);
        }
      }
      slide(rows);
      slide(grads);
    }
  }

  template <int Number, int Own>
  static MMSOFTPOOL_BODY void write_row(
      const Arguments& a, T* to, int32_t w, const A (&grads)[Number][Channels]) {
    const int32_t left = a.in_w - w;
    if (Channels == 1 && a.packed && left >= 2 * Cols) {
      Pack<T, 2 * Cols> p;
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < 2 * Cols; ++j) {
        p.values[j] = T(grads[Own + j][0]);
      }
      *reinterpret_cast<Pack<T, 2 * Cols>*>(to) = p;
      return;
    }
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < 2 * Cols; ++j) {
      if (j < left) {
        Pack<T, Channels> p;
        MMSOFTPOOL_UNROLL
        for (int c = 0; c < Channels; ++c) {
          p.values[c] = T(grads[Own + j][c]);
        }
        *reinterpret_cast<Pack<T, Channels>*>(to + int64_t(j) * a.step) = p;
      }
    }
  }
};

// Calls run(Strip) with the strip that fits the pooling and returns true, or returns false.
// `aligned` says that all tensors begin at a multiple of 16 bytes.
template <typename T, typename Run>
bool with_strip(const Pooling& pooling, bool aligned, const Run& run) {
  const auto is = [&](int64_t kernel_size, int64_t padding) {
    for (const Axis* axis : {&pooling.height, &pooling.width}) {
      if (axis->kernel_size != kernel_size || axis->stride != 2 || axis->padding != padding ||
          axis->dilation != 1) {
        return false;
      }
    }
    constexpr int64_t limit = 1 << 29;  // columns and rows are counted in 32 bits
    return pooling.depth.in == 1 && pooling.depth.out == 1 && pooling.depth.kernel_size == 1 &&
           pooling.height.in < limit && pooling.width.in < limit && pooling.channels < limit;
  };
  const auto run_if_it_fits = [&](auto strip) {
    if (!decltype(strip)::fits(pooling)) {
      return false;
    }
    run(strip);
    return true;
  };
  if constexpr (sizeof(T) == 8) {
    return false;
  } else {
    // Contiguous: 16 bytes of columns. Channels last: 16 or 8 bytes of channels.
    constexpr int cols = sizeof(T) == 2 ? 4 : 2;
    constexpr int channels = 4;
    const bool contiguous = pooling.layout == Layout::contiguous;
    if (!contiguous && (!aligned || pooling.channels % channels != 0)) {
      return false;
    }
    const auto run_in_layout = [&](auto contiguous_strip, auto channels_last_strip) {
      return contiguous ? run_if_it_fits(contiguous_strip) : run_if_it_fits(channels_last_strip);
    };
    if (is(2, 0)) {
      return run_in_layout(Strip<T, 2, 0, cols, 1>(), Strip<T, 2, 0, 1, channels>());
    }
    if (is(3, 0)) {
      return run_in_layout(Strip<T, 3, 0, cols, 1>(), Strip<T, 3, 0, 1, channels>());
    }
    if (is(3, 1)) {
      return run_in_layout(Strip<T, 3, 1, cols, 1>(), Strip<T, 3, 1, 1, channels>());
    }
    return false;
  }
}

// How many windows a thread of the strip S walks down: as many as leave enough threads to fill any
// GPU several times over. threads_per_row: how many threads there are for a row of windows.
template <typename S>
int64_t strip_rows(int64_t threads_per_row, int64_t height) {
  constexpr int64_t wanted = 1 << 19;
  int64_t rows = S::max_rows;
  while (rows > 1 && threads_per_row * ((height + rows - 1) / rows) < wanted) {
    rows /= 2;
  }
  return rows;
}

// Whether rows of 16-byte packs are aligned in a contiguous tensor.
template <typename T>
bool is_packed(const Pooling& pooling, bool aligned) {
  return aligned && pooling.width.in % int64_t(16 / sizeof(T)) == 0;
}

}  // namespace mmsoftpool::cuda
