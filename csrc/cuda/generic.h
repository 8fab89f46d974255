// Any pooling: one output, or one input, a thread. For what strip.h and ring.h do not cover.
//
// A window of very many taps, such as that of a global pool, is divided into slices, each a thread,
// where there are few windows; their sums are merged.
#pragma once

#include <algorithm>

#include "window.h"

namespace mmsoftpool::cuda {

// The arguments of a pooling as numbers of type Int. In 32 bits an index takes half the
// instructions of one in 64, and a division a fifth.
template <typename Int>
struct IndexAxis {
  Int in, out, kernel_size, stride, padding, dilation;
  bool adaptive;

  explicit IndexAxis(const Axis& axis)
      : in(static_cast<Int>(axis.in)),
        out(static_cast<Int>(axis.out)),
        kernel_size(static_cast<Int>(axis.kernel_size)),
        stride(static_cast<Int>(axis.stride)),
        padding(static_cast<Int>(axis.padding)),
        dilation(static_cast<Int>(axis.dilation)),
        adaptive(axis.adaptive) {}

  MMSOFTPOOL_BODY Int first_input(Int o) const {
    return adaptive ? o * in / out : o * stride - padding;
  }
};
template <typename Int>
struct Indices {
  bool channels_last;
  Gradient gradient;
  Int channels;
  IndexAxis<Int> depth, height, width;

  explicit Indices(const Pooling& pooling)
      : channels_last(pooling.layout == Layout::channels_last),
        gradient(pooling.gradient),
        channels(static_cast<Int>(pooling.channels)),
        depth(pooling.depth),
        height(pooling.height),
        width(pooling.width) {}
};
// Whether 32 bits hold all numbers that the functions below compute.
inline bool fits_32_bits(const Pooling& pooling) {
  constexpr int64_t limit = 1 << 29;
  for (const Axis* axis : {&pooling.depth, &pooling.height, &pooling.width}) {
    if (axis->in > limit || axis->padding > limit || axis->stride > limit ||
        axis->out > limit / axis->stride || axis->kernel_size > limit / axis->dilation ||
        (axis->adaptive && axis->out > limit / axis->in)) {
      return false;
    }
  }
  // The last block has threads beyond the last element.
  const int64_t room = INT32_MAX - 1024;
  return pooling.planes() <= room / std::max<int64_t>(pooling.in_plane(), 1) &&
         pooling.planes() <= room / std::max<int64_t>(pooling.out_plane(), 1);
}

// The plane and the position of an element.
template <typename Int>
struct Position {
  Int p, d, h, w;
};
// Its offset in a tensor of these sizes.
template <typename Int>
MMSOFTPOOL_BODY Int
offset(const Indices<Int>& indices, const Position<Int>& at, Int size_d, Int size_h, Int size_w) {
  if (!indices.channels_last) {
    return ((at.p * size_d + at.d) * size_h + at.h) * size_w + at.w;
  }
  const Int n = at.p / indices.channels, c = at.p - n * indices.channels;
  return (((n * size_d + at.d) * size_h + at.h) * size_w + at.w) * indices.channels + c;
}
template <typename Int>
MMSOFTPOOL_BODY Int input_offset(const Indices<Int>& indices, const Position<Int>& at) {
  return offset(indices, at, indices.depth.in, indices.height.in, indices.width.in);
}
template <typename Int>
MMSOFTPOOL_BODY Int output_offset(const Indices<Int>& indices, const Position<Int>& at) {
  return offset(indices, at, indices.depth.out, indices.height.out, indices.width.out);
}

// The position of element i, in the order of memory, of a tensor of these sizes.
template <typename Int>
MMSOFTPOOL_BODY Position<Int> find_position(
    const Indices<Int>& indices, Int i, Int size_d, Int size_h, Int size_w) {
  using Unsigned = std::make_unsigned_t<Int>;
  Unsigned rest = static_cast<Unsigned>(i);
  const auto take = [&](Int size) {
    const Unsigned quotient = rest / static_cast<Unsigned>(size);
    const Unsigned remainder = rest - quotient * static_cast<Unsigned>(size);
    rest = quotient;
    return static_cast<Int>(remainder);
  };
  Position<Int> position;
  const Int c = indices.channels_last ? take(indices.channels) : 0;
  position.w = take(size_w);
  position.h = take(size_h);
  position.d = take(size_d);
  position.p = static_cast<Int>(rest);
  if (indices.channels_last) {
    position.p = position.p * indices.channels + c;
  }
  return position;
}
template <typename Int>
MMSOFTPOOL_BODY Position<Int> input_position(const Indices<Int>& indices, Int i) {
  return find_position(indices, i, indices.depth.in, indices.height.in, indices.width.in);
}
template <typename Int>
MMSOFTPOOL_BODY Position<Int> output_position(const Indices<Int>& indices, Int i) {
  return find_position(indices, i, indices.depth.out, indices.height.out, indices.width.out);
}

// From a column to the next.
template <typename Int>
MMSOFTPOOL_BODY Int column_step(const Indices<Int>& indices) {
  return indices.channels_last ? indices.channels : 1;
}

// The taps k of an axis that lie inside the input for output o: a range, since taps ascend.
template <typename Int>
struct Range {
  Int begin, end;
};
template <typename Int>
MMSOFTPOOL_BODY Range<Int> taps_inside(const IndexAxis<Int>& axis, Int o) {
  const Int first = axis.first_input(o);
  Range<Int> range;
  if (axis.adaptive) {
    range.begin = 0;
    range.end = ((o + 1) * axis.in + axis.out - 1) / axis.out - first;
    return range;
  }
  if (axis.dilation == 1) {
    range.begin = first >= 0 ? 0 : -first;
    range.end = axis.in - first < axis.kernel_size ? axis.in - first : axis.kernel_size;
    return range;
  }
  range.begin = first >= 0 ? 0 : (-first + axis.dilation - 1) / axis.dilation;
  const Int room = axis.in - 1 - first;
  range.end = room < 0 ? 0 : room / axis.dilation + 1;
  range.end = range.end < axis.kernel_size ? range.end : axis.kernel_size;
  return range;
}

// Calls visit(x) for the taps of the window of an output.
template <typename T, typename Int, typename Visit>
MMSOFTPOOL_BODY void for_each_tap(
    const Indices<Int>& indices, const T* input, const Position<Int>& output, const Visit& visit) {
  const Range<Int> rd = taps_inside(indices.depth, output.d);
  const Range<Int> rh = taps_inside(indices.height, output.h);
  const Range<Int> rw = taps_inside(indices.width, output.w);
  if (rw.begin >= rw.end) {
    return;
  }
  const Int step = indices.width.dilation * column_step(indices);
  Position<Int> first;
  first.p = output.p;
  first.w = indices.width.first_input(output.w) + rw.begin * indices.width.dilation;
  for (Int kd = rd.begin; kd < rd.end; ++kd) {
    first.d = indices.depth.first_input(output.d) + kd * indices.depth.dilation;
    for (Int kh = rh.begin; kh < rh.end; ++kh) {
      first.h = indices.height.first_input(output.h) + kh * indices.height.dilation;
      const T* tap = input + input_offset(indices, first);
      for (Int kw = rw.begin; kw < rw.end; ++kw) {
        visit(Compute<T>(*tap));
        tap += step;
      }
    }
  }
}

template <typename T, typename Int>
MMSOFTPOOL_BODY Window<Compute<T>> window_of(
    const Indices<Int>& indices, const Exponent<Compute<T>>& exponent, const T* input,
    const Position<Int>& output) {
  using A = Compute<T>;
  A max = Window<A>::lowest;
  for_each_tap(indices, input, output, [&](A x) { max = Window<A>::update_max(max, x); });
  Window<A> window(exponent, max * exponent.unit);
  for_each_tap(indices, input, output, [&](A x) { window.add(x); });
  return window;
}

// How many slices a window is divided into: 1 unless taps are many and windows few.
inline int64_t count_slices(const Pooling& pooling) {
  constexpr int64_t wanted = 1 << 18, most = 256, taps_of_slice = 32;  // threads; the last two
  const int64_t outputs = std::max<int64_t>(pooling.planes() * pooling.out_plane(), 1);
  int64_t taps = 1;
  for (const Axis* axis : {&pooling.depth, &pooling.height, &pooling.width}) {
    taps *= std::min(axis->kernel_size, axis->in);
  }
  return std::max<int64_t>(1, std::min({wanted / outputs, taps / taps_of_slice, most}));
}

// Calls visit(x) for every `slices`-th tap of the window of an output, from tap `slice` on.
template <typename T, typename Int, typename Visit>
MMSOFTPOOL_BODY void for_each_tap_of_slice(
    const Indices<Int>& indices, const T* input, const Position<Int>& output, Int slice, Int slices,
    const Visit& visit) {
  const Range<Int> rd = taps_inside(indices.depth, output.d);
  const Range<Int> rh = taps_inside(indices.height, output.h);
  const Range<Int> rw = taps_inside(indices.width, output.w);
  const Int depth = rd.end - rd.begin, height = rh.end - rh.begin, width = rw.end - rw.begin;
  if (depth <= 0 || height <= 0 || width <= 0) {
    return;
  }
  // From a tap to the next without divisions.
  const Int step_h = slices / width, step_w = slices - step_h * width;
  Int d = 0, h = slice / width, w = slice - h * width;
  while (true) {
    while (h >= height) {
      h -= height;
      ++d;
    }
    if (d >= depth) {
      return;
    }
    Position<Int> at;
    at.p = output.p;
    at.d = indices.depth.first_input(output.d) + (rd.begin + d) * indices.depth.dilation;
    at.h = indices.height.first_input(output.h) + (rh.begin + h) * indices.height.dilation;
    at.w = indices.width.first_input(output.w) + (rw.begin + w) * indices.width.dilation;
    visit(Compute<T>(input[input_offset(indices, at)]));
    h += step_h;
    w += step_w;
    if (w >= width) {
      w -= width;
      ++h;
    }
  }
}

// The outputs o of an axis that have input i as a tap are those of a range with
// (i + padding - o * stride) divisible by the dilation. In adaptive pooling o and i change places:
// from o in / out < i + 1 and (o + 1) in / out > i.
template <typename Int>
MMSOFTPOOL_BODY Range<Int> outputs_around(const IndexAxis<Int>& axis, Int i) {
  if (axis.adaptive) {
    return {i * axis.out / axis.in, ((i + 1) * axis.out + axis.in - 1) / axis.in};
  }
  const Int last = i + axis.padding;
  const Int first = last - (axis.kernel_size - 1) * axis.dilation;
  Range<Int> range;
  range.begin = first <= 0 ? 0 : (first + axis.stride - 1) / axis.stride;
  range.end = last / axis.stride + 1;
  range.end = range.end < axis.out ? range.end : axis.out;
  return range;
}
template <typename Int>
MMSOFTPOOL_BODY bool is_tap(const IndexAxis<Int>& axis, Int o, Int i) {
  return axis.dilation == 1 || (i - axis.first_input(o)) % axis.dilation == 0;
}

template <typename T, typename Integer>
struct General {
  using A = Compute<T>;
  using Int = Integer;
  static constexpr bool two_steps = true, has_slices = true;

  struct Arguments {
    Indices<Int> indices;
    Exponent<A> exponent;
    Int outputs, slices;
    A* slices_of_windows;  // for more than one: the maximum, the sum and the mean of each
    int64_t threads;
  };
  static Arguments arguments(const Pooling& pooling, int64_t threads) {
    const int64_t outputs = pooling.planes() * pooling.out_plane();
    return {
        Indices<Int>(pooling),
        make_exponent<A>(pooling),
        Int(outputs),
        Int(count_slices(pooling)),
        nullptr,
        threads};
  }
  static Arguments forward_arguments(const Pooling& pooling, int64_t = 0) {
    return arguments(pooling, pooling.planes() * pooling.out_plane());
  }
  static Arguments backward_arguments(const Pooling& pooling, int64_t = 0) {
    return arguments(pooling, pooling.planes() * pooling.in_plane());
  }
  static int64_t batch(const Pooling& pooling) { return pooling.batch; }
  static int64_t workspace(const Pooling& pooling) {
    return 3 * pooling.planes() * pooling.out_plane();
  }

  // Thread i summarizes a slice. Neighbouring threads have neighbouring inputs: slices of a window,
  // or with the channels last a slice of several windows.
  static MMSOFTPOOL_BODY void summarize_slice(const Arguments& a, const T* input, Int i) {
    const Int slice = a.indices.channels_last ? i / a.outputs : i % a.slices;
    const Int output = a.indices.channels_last ? i % a.outputs : i / a.slices;
    const Position<Int> position = output_position(a.indices, output);
    A max = Window<A>::lowest;
    for_each_tap_of_slice(a.indices, input, position, slice, a.slices, [&](A x) {
      max = Window<A>::update_max(max, x);
    });
    Window<A> window(a.exponent, max * a.exponent.unit);
    for_each_tap_of_slice(a.indices, input, position, slice, a.slices, [&](A x) { window.add(x); });
    A* const numbers = a.slices_of_windows + 3 * (int64_t(output) * a.slices + slice);
    numbers[0] = window.max;
    numbers[1] = window.sum;
    numbers[2] = window.mean;
  }
  // The window of output i, from those of its slices if there are any.
  static MMSOFTPOOL_BODY Window<A> find_window(const Arguments& a, const T* input, Int i) {
    const Position<Int> position = output_position(a.indices, i);
    const A* const begin = a.slices_of_windows + 3 * int64_t(i) * a.slices;
    const A* const end = begin + (a.slices > 1 ? 3 * int64_t(a.slices) : 0);
    A max = Window<A>::lowest;
    if (a.slices == 1) {
      for_each_tap(a.indices, input, position, [&](A x) { max = Window<A>::update_max(max, x); });
    }
    max *= a.exponent.unit;
    for (const A* slice = begin; slice < end; slice += 3) {
      max = Window<A>::update_max(max, slice[0]);
    }
    Window<A> window(a.exponent, max);
    if (a.slices == 1) {
      for_each_tap(a.indices, input, position, [&](A x) { window.add(x); });
    }
    for (const A* slice = begin; slice < end; slice += 3) {
      window.add_window(slice[0], slice[1], slice[2]);
    }
    return window;
  }

  static MMSOFTPOOL_BODY void forward(const Arguments& a, const T* input, T* output, Int i) {
    output[i] = T(find_window(a, input, i).output());
  }

  // The backward takes two steps, so that no two threads add to the same number. First thread i
  // writes what the gradients of the taps of window i need, three numbers, to the workspace.
  static MMSOFTPOOL_BODY void summarize(
      const Arguments& a, const T* grad_output, const T* input, A* workspace, Int i) {
    const Window<A> window = find_window(a, input, i);
    workspace += 3 * int64_t(i);
    workspace[0] = window.max;
    workspace[1] = window.scale(A(grad_output[i]));
    workspace[2] = window.offset();
  }
  // Then thread i gathers the gradient of input i from the windows around it.
  static MMSOFTPOOL_BODY void backward(
      const Arguments& a, const A* workspace, const T* input, T* grad_input, Int i) {
    const Indices<Int>& indices = a.indices;
    const Position<Int> position = input_position(indices, i);
    const Range<Int> rd = outputs_around(indices.depth, position.d);
    const Range<Int> rh = outputs_around(indices.height, position.h);
    const Range<Int> rw = outputs_around(indices.width, position.w);
    const A x = A(input[i]);
    A grad = 0;
    const int64_t step = 3 * int64_t(column_step(indices));
    Position<Int> first;
    first.p = position.p;
    first.w = rw.begin;
    for (first.d = rd.begin; first.d < rd.end; ++first.d) {
      for (first.h = rh.begin; first.h < rh.end; ++first.h) {
        if (!is_tap(indices.depth, first.d, position.d) ||
            !is_tap(indices.height, first.h, position.h)) {
          continue;
        }
        const A* summary = workspace + 3 * int64_t(output_offset(indices, first));
        for (Int w = rw.begin; w < rw.end; ++w) {
          if (is_tap(indices.width, w, position.w)) {
            const Window<A> window(a.exponent, summary[0]);
            grad += summary[1] * window.share(x, summary[2], indices.gradient);
          }
          summary += step;
        }
      }
    }
    grad_input[i] = T(grad);
  }
};

}  // namespace mmsoftpool::cuda
