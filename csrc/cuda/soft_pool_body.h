// What one CUDA thread does, as plain functions: of the arguments of the call and the number of the
// thread. No thread talks to another, so the host can run all of them one after the other, and the
// tests do (tests/ops/test_cuda_on_host.py): the index arithmetic is checked without a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../geometry.h"
#include "../softmax.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MMSOFTPOOL_BODY __host__ __device__ __forceinline__
#else
#define MMSOFTPOOL_BODY inline
#endif
#ifdef __CUDA_ARCH__
#define MMSOFTPOOL_UNROLL _Pragma("unroll")
#else
#define MMSOFTPOOL_UNROLL
#endif

namespace mmsoftpool::cuda {

template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

// 2^x for x <= 0; NaN stays NaN.
MMSOFTPOOL_BODY float exp2_nonpositive(float x) { return ::exp2f(x); }  // 2 ulp on the GPU
MMSOFTPOOL_BODY double exp2_nonpositive(double x) { return ::exp2(x); }

template <typename A>
Exponent<A> make_exponent(const Geometry& g) {
  return Exponent<A>(g.alpha, g.taps(), A(sizeof(A) == 4 ? -104 : -746));  // e^that is 0
}

// a / sum for a sum of weights, between 1 and the number of taps, or NaN.
MMSOFTPOOL_BODY float over_sum(float a, float sum) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, sum);  // 2 ulp, and no subroutine call
#else
  return a / sum;
#endif
}
MMSOFTPOOL_BODY double over_sum(double a, double sum) { return a / sum; }

// The larger number; x is passed over if it is NaN, which shows up in Window::weight().
template <typename A>
MMSOFTPOOL_BODY A larger(A max, A x) {
  return x > max ? x : max;
}

// The softmax of one window, over its taps in turn. Equation 1 of the paper with the maximum
// subtracted: with d = unit * (x - max), see Exponent, the weight is w = e^(alpha d) / sum and the
// output max + mean / sum, where mean is the sum of e^(alpha d) d.
template <typename A>
struct Window {
  const Exponent<A>& exponent;
  A max;  // times the unit
  A sum = 0;
  A mean = 0;

  // The start of the maximum: not below the lowest number, for in a window of -inf alone x - max
  // must not be -inf + inf.
  static constexpr A lowest = std::numeric_limits<A>::lowest();

  MMSOFTPOOL_BODY Window(const Exponent<A>& exponent, A scaled_max)
      : exponent(exponent), max(scaled_max) {}

  // d, not below the floor. A comparison with NaN is false: NaN stays NaN.
  MMSOFTPOOL_BODY A difference(A x) const {
    const A d = x * exponent.unit - max;
    return d < exponent.floor ? exponent.floor : d;
  }
  // e^(alpha d).
  MMSOFTPOOL_BODY A weight(A d) const {
    return d <= exponent.floor ? A(0) : exp2_nonpositive(d * exponent.log2e_alpha_per_unit);
  }

  MMSOFTPOOL_BODY void add(A x) {
    const A d = difference(x);
    const A w = weight(d);
    sum += w;
    mean += w * d;
  }

  // Equation 2. No weight at all means nothing but -inf.
  MMSOFTPOOL_BODY A output() const {
    return sum == 0 ? -std::numeric_limits<A>::infinity()
                    : (max + over_sum(mean, sum)) * exponent.per_unit;
  }

  // The gradient of a tap is scale * weight(d) * slope(d, offset).
  MMSOFTPOOL_BODY A scale(A grad_output) const {
    return sum == 0 ? A(0) : over_sum(grad_output, sum);
  }
  MMSOFTPOOL_BODY A offset() const {
    return sum == 0 ? A(1) : 1 - exponent.alpha_per_unit * over_sum(mean, sum);
  }
  MMSOFTPOOL_BODY A slope(A d, A offset) const { return exponent.alpha_per_unit * d + offset; }
};

// ---- any pooling: one output, or one input, a thread ---------------------------------------

// Where element (plane p, depth d, height h, width w) lies.
MMSOFTPOOL_BODY int64_t place(
    const Geometry& g, int64_t p, int64_t d, int64_t h, int64_t w, int64_t in_d, int64_t in_h,
    int64_t in_w) {
  if (g.layout == Layout::contiguous) {
    return ((p * in_d + d) * in_h + h) * in_w + w;
  }
  const int64_t n = p / g.channels, c = p % g.channels;
  return (((n * in_d + d) * in_h + h) * in_w + w) * g.channels + c;
}
MMSOFTPOOL_BODY int64_t input_place(const Geometry& g, int64_t p, int64_t d, int64_t h, int64_t w) {
  return place(g, p, d, h, w, g.depth.in, g.height.in, g.width.in);
}
MMSOFTPOOL_BODY int64_t
output_place(const Geometry& g, int64_t p, int64_t d, int64_t h, int64_t w) {
  return place(g, p, d, h, w, g.depth.out, g.height.out, g.width.out);
}

// Splits the number of an element, in the order of memory, into its plane and position.
struct Position {
  int64_t p, d, h, w;
};
MMSOFTPOOL_BODY Position
position(const Geometry& g, int64_t i, int64_t size_d, int64_t size_h, int64_t size_w) {
  Position at;
  int64_t c = 0;
  if (g.layout == Layout::channels_last) {
    c = i % g.channels;
    i /= g.channels;
  }
  at.w = i % size_w;
  i /= size_w;
  at.h = i % size_h;
  i /= size_h;
  at.d = i % size_d;
  i /= size_d;
  at.p = g.layout == Layout::channels_last ? i * g.channels + c : i;
  return at;
}

// The taps k of an axis that lie inside the input for output o: a range, since taps ascend.
struct Range {
  int64_t begin, end;
};
MMSOFTPOOL_BODY Range taps_inside(const Axis& axis, int64_t o) {
  const int64_t first = axis.first_input(o);
  Range range;
  range.begin = first >= 0 ? 0 : (-first + axis.dilation - 1) / axis.dilation;
  const int64_t room = axis.in - 1 - first;
  range.end = room < 0 ? 0 : room / axis.dilation + 1;
  range.end = range.end < axis.kernel ? range.end : axis.kernel;
  return range;
}

// Calls visit(x) for the taps of the window of an output.
template <typename T, typename Visit>
MMSOFTPOOL_BODY void for_each_tap(
    const Geometry& g, const T* input, const Position& at, const Visit& visit) {
  const Range rd = taps_inside(g.depth, at.d);
  const Range rh = taps_inside(g.height, at.h);
  const Range rw = taps_inside(g.width, at.w);
  for (int64_t kd = rd.begin; kd < rd.end; ++kd) {
    for (int64_t kh = rh.begin; kh < rh.end; ++kh) {
      for (int64_t kw = rw.begin; kw < rw.end; ++kw) {
        visit(
            Compute<T>(input[input_place(
                g, at.p, g.depth.first_input(at.d) + kd * g.depth.dilation,
                g.height.first_input(at.h) + kh * g.height.dilation,
                g.width.first_input(at.w) + kw * g.width.dilation)]));
      }
    }
  }
}

template <typename T>
MMSOFTPOOL_BODY Window<Compute<T>> window_of(
    const Geometry& g, const Exponent<Compute<T>>& exponent, const T* input, const Position& at) {
  using A = Compute<T>;
  A max = Window<A>::lowest;
  for_each_tap(g, input, at, [&](A x) { max = larger(max, x); });
  Window<A> window(exponent, max * exponent.unit);
  for_each_tap(g, input, at, [&](A x) { window.add(x); });
  return window;
}

// Thread i makes output i.
template <typename T>
MMSOFTPOOL_BODY void forward_any(
    const Geometry& g, const Exponent<Compute<T>>& exponent, const T* input, T* output, int64_t i) {
  const Position at = position(g, i, g.depth.out, g.height.out, g.width.out);
  output[i] = T(window_of(g, exponent, input, at).output());
}

// The backward of any pooling takes two steps, so that no thread adds where another does. First
// thread i notes what the gradient of the taps of window i needs: three numbers.
template <typename T>
MMSOFTPOOL_BODY void note_window(
    const Geometry& g, const Exponent<Compute<T>>& exponent, const T* grad_output, const T* input,
    Compute<T>* notes, int64_t i) {
  const Position at = position(g, i, g.depth.out, g.height.out, g.width.out);
  const auto window = window_of(g, exponent, input, at);
  notes[3 * i] = window.max;
  notes[3 * i + 1] = window.scale(Compute<T>(grad_output[i]));
  notes[3 * i + 2] = window.offset();
}

// The outputs o of an axis that have input i as a tap are those of a range with
// (i + pad - o * stride) divisible by the dilation.
MMSOFTPOOL_BODY Range outputs_around(const Axis& axis, int64_t i) {
  const int64_t last = i + axis.pad;
  const int64_t first = last - (axis.kernel - 1) * axis.dilation;
  Range range;
  range.begin = first <= 0 ? 0 : (first + axis.stride - 1) / axis.stride;
  range.end = last / axis.stride + 1;
  range.end = range.end < axis.out ? range.end : axis.out;
  return range;
}
MMSOFTPOOL_BODY bool is_tap(const Axis& axis, int64_t o, int64_t i) {
  return (i - axis.first_input(o)) % axis.dilation == 0;
}

// Then thread i gathers the gradient of input i from the windows around it.
template <typename T>
MMSOFTPOOL_BODY void backward_any(
    const Geometry& g, const Exponent<Compute<T>>& exponent, const Compute<T>* notes,
    const T* input, T* grad_input, int64_t i) {
  using A = Compute<T>;
  const bool exact = g.gradient == Gradient::exact;
  const Position at = position(g, i, g.depth.in, g.height.in, g.width.in);
  const Range rd = outputs_around(g.depth, at.d);
  const Range rh = outputs_around(g.height, at.h);
  const Range rw = outputs_around(g.width, at.w);
  const A x = A(input[i]);
  A grad = 0;
  for (int64_t d = rd.begin; d < rd.end; ++d) {
    for (int64_t h = rh.begin; h < rh.end; ++h) {
      for (int64_t w = rw.begin; w < rw.end; ++w) {
        if (is_tap(g.depth, d, at.d) && is_tap(g.height, h, at.h) && is_tap(g.width, w, at.w)) {
          const A* const note = notes + 3 * output_place(g, at.p, d, h, w);
          const Window<A> window(exponent, note[0]);
          const A d = window.difference(x);
          grad += note[1] * window.weight(d) * (exact ? window.slope(d, note[2]) : A(1));
        }
      }
    }
  }
  grad_input[i] = T(grad);
}

// ---- the pools of networks: 2 x 2 and 3 x 3 windows, stride 2 -------------------------------

// `Count` neighbouring numbers that one instruction moves: they are aligned to their whole size.
template <typename T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T at[Count];
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
    Arguments(const Geometry& g, int64_t rows, int64_t cover_h, int64_t cover_w, bool packed)
        : in_h(static_cast<int32_t>(g.height.in)),
          in_w(static_cast<int32_t>(g.width.in)),
          out_h(static_cast<int32_t>(g.height.out)),
          out_w(static_cast<int32_t>(g.width.out)),
          step(Channels > 1 ? static_cast<int32_t>(g.channels) : 1),
          packs(Channels > 1 ? static_cast<uint32_t>(g.channels / Channels) : 1),
          strips(static_cast<uint32_t>((cover_w + Cols - 1) / Cols)),
          parts(static_cast<uint32_t>((cover_h + rows - 1) / rows)),
          rows(static_cast<int32_t>(rows)),
          packed(packed),
          exact(g.gradient == Gradient::exact),
          exponent(make_exponent<A>(g)),
          in_size(g.in_plane() * step),
          out_size(g.out_plane() * step),
          threads(g.planes() / Channels * strips * parts) {}
  };

  // For the forward, strips over all outputs; for the backward, over all inputs.
  static Arguments forward_arguments(const Geometry& g, int64_t rows, bool packed) {
    return Arguments(g, rows, g.height.out, g.width.out, packed);
  }
  static Arguments backward_arguments(const Geometry& g, int64_t rows, bool packed) {
    return Arguments(g, rows, (g.height.in + 1) / 2, (g.width.in + 1) / 2, packed);
  }

  // Which strip thread i has: its first window, and where its plane (or its channels) begins.
  struct Place {
    int32_t oh, ow;
    int64_t input, output;
  };
  static MMSOFTPOOL_BODY Place find(const Arguments& a, uint32_t i) {
    Place at;
    uint32_t c = 0;
    if (Channels > 1) {
      c = i % a.packs * Channels;
      i /= a.packs;
    }
    at.ow = static_cast<int32_t>(i % a.strips) * Cols;
    i /= a.strips;
    at.oh = static_cast<int32_t>(i % a.parts) * a.rows;
    i /= a.parts;
    at.input = i * a.in_size + c;  // i is an image, or a plane if the tensor is contiguous
    at.output = i * a.out_size + c;
    return at;
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
        row[(has_pack ? Aligned : 0) + j][0] = A(p.at[j]);
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
        row[j][c] = inside ? A(p.at[c]) : -std::numeric_limits<A>::infinity();
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
      max = larger(max, rows[k / K][column + k % K][c]);
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
    const Place at = find(a, i);
    constexpr int number = 2 * (Cols - 1) + K;
    const int32_t w = 2 * at.ow - Pad;
    const int32_t end = at.oh + a.rows < a.out_h ? at.oh + a.rows : a.out_h;
    A rows[K][number][Channels];
    if (K == 3) {
      read_row<number, Pad>(a, input + at.input, 2 * at.oh - Pad, w, rows[0]);
    }
    for (int32_t oh = at.oh; oh < end; ++oh) {
      MMSOFTPOOL_UNROLL
      for (int k = K - 2; k < K; ++k) {
        read_row<number, Pad>(a, input + at.input, 2 * oh - Pad + k, w, rows[k]);
      }
      T* const to = output + at.output + (int64_t(oh) * a.out_w + at.ow) * a.step;
      Pack<T, Cols * Channels> result;
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < Cols; ++j) {
        MMSOFTPOOL_UNROLL
        for (int c = 0; c < Channels; ++c) {
          result.at[j * Channels + c] = T(window(a, rows, 2 * j, c).output());
        }
      }
      if (Channels > 1 || (a.packed && a.out_w % Cols == 0)) {
        *reinterpret_cast<Pack<T, Cols * Channels>*>(to) = result;
      } else {
        MMSOFTPOOL_UNROLL
        for (int j = 0; j < Cols; ++j) {
          if (at.ow + j < a.out_w) {
            to[j] = result.at[j];
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
    const Place at = find(a, i);
    constexpr int halo = K == 3 ? 1 : 0;         // windows beyond the strip, on one side
    constexpr int first = K == 3 ? Pad - 1 : 0;  // from the strip's first window on
    constexpr int windows = Cols + halo;
    constexpr int number = 2 * (windows - 1) + K;
    constexpr int own = K == 3 ? 2 - Pad : 0;  // the strip's first column among those read
    const int32_t w = 2 * (at.ow + first) - Pad;
    const int32_t row_begin = 2 * at.oh;
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
    const int32_t oh_begin = at.oh + first;
    if (K == 3) {
      read_row<number, own>(a, input + at.input, 2 * oh_begin - Pad, w, rows[0]);
    }
    for (int32_t oh = oh_begin; 2 * oh - Pad < row_end; ++oh) {
      MMSOFTPOOL_UNROLL
      for (int k = K - 2; k < K; ++k) {
        read_row<number, own>(a, input + at.input, 2 * oh - Pad + k, w, rows[k]);
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
        const int32_t ow = at.ow + first + j;
        if (row_inside && ow >= 0 && ow < a.out_w) {
          const T* const from = grad_output + at.output + (int64_t(oh) * a.out_w + ow) * a.step;
          const auto grad = *reinterpret_cast<const Pack<T, Channels>*>(from);
          MMSOFTPOOL_UNROLL
          for (int c = 0; c < Channels; ++c) {
            const Window<A> current = window(a, rows, 2 * j, c);
            const A scale = current.scale(A(grad.at[c]));
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
      // The first two rows are complete; the third one goes on with the next windows.
      MMSOFTPOOL_UNROLL
      for (int k = 0; k < 2; ++k) {
        const int32_t h = 2 * oh - Pad + k;
        if (h >= row_begin && h < row_end) {
          T* const to = grad_input + at.input + (int64_t(h) * a.in_w + 2 * at.ow) * a.step;
          write_row<number, own>(a, to, 2 * at.ow, grads[k]);
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
        p.at[j] = T(grads[Own + j][0]);
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
          p.at[c] = T(grads[Own + j][c]);
        }
        *reinterpret_cast<Pack<T, Channels>*>(to + int64_t(j) * a.step) = p;
      }
    }
  }
};

// ---- which strip, if any --------------------------------------------------------------------

// Calls run(Strip) with the strip that fits the pooling and returns true, or returns false.
// `aligned` says that all tensors begin at a multiple of 16 bytes.
template <typename T, typename Run>
bool with_strip(const Geometry& g, bool aligned, const Run& run) {
  const auto is = [&](int64_t kernel, int64_t pad) {
    for (const Axis* axis : {&g.height, &g.width}) {
      if (axis->kernel != kernel || axis->stride != 2 || axis->pad != pad || axis->dilation != 1) {
        return false;
      }
    }
    constexpr int64_t limit = 1 << 29;  // columns and rows are counted in 32 bits
    return g.depth.in == 1 && g.depth.out == 1 && g.depth.kernel == 1 && g.height.in < limit &&
           g.width.in < limit && g.channels < limit;
  };
  if constexpr (sizeof(T) == 8) {
    return false;
  } else {
    // Contiguous: 16 bytes of columns. Channels last: 16 or 8 bytes of channels.
    constexpr int cols = sizeof(T) == 2 ? 4 : 2;
    constexpr int channels = 4;
    const bool contiguous = g.layout == Layout::contiguous;
    if (!contiguous && (!aligned || g.channels % channels != 0)) {
      return false;
    }
    if (is(2, 0)) {
      contiguous ? run(Strip<T, 2, 0, cols, 1>()) : run(Strip<T, 2, 0, 1, channels>());
    } else if (is(3, 0)) {
      contiguous ? run(Strip<T, 3, 0, cols, 1>()) : run(Strip<T, 3, 0, 1, channels>());
    } else if (is(3, 1)) {
      contiguous ? run(Strip<T, 3, 1, cols, 1>()) : run(Strip<T, 3, 1, 1, channels>());
    } else {
      return false;
    }
    return true;
  }
}

// How many windows a thread walks down: as many as leave `wanted` threads, at most 16.
inline int64_t strip_rows(int64_t strips, int64_t out_h, int64_t wanted) {
  int64_t rows = 16;
  while (rows > 1 && strips * ((out_h + rows - 1) / rows) < wanted) {
    rows /= 2;
  }
  return rows;
}

// Whether rows of 16-byte packs are aligned in a contiguous tensor.
template <typename T>
bool is_packed(const Geometry& g, bool aligned) {
  return aligned && g.width.in % int64_t(16 / sizeof(T)) == 0;
}

}  // namespace mmsoftpool::cuda
