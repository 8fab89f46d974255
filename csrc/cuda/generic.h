// Any pooling: one output, or one input, a thread. For what strip.h does not cover.
#pragma once

#include "window.h"

namespace mmsoftpool::cuda {

// Offset of element (plane p, depth d, height h, width w) in a tensor of these sizes.
MMSOFTPOOL_BODY int64_t offset(
    const Pooling& pooling, int64_t p, int64_t d, int64_t h, int64_t w, int64_t size_d,
    int64_t size_h, int64_t size_w) {
  if (pooling.layout == Layout::contiguous) {
    return ((p * size_d + d) * size_h + h) * size_w + w;
  }
  const int64_t n = p / pooling.channels, c = p % pooling.channels;
  return (((n * size_d + d) * size_h + h) * size_w + w) * pooling.channels + c;
}
MMSOFTPOOL_BODY int64_t
input_offset(const Pooling& pooling, int64_t p, int64_t d, int64_t h, int64_t w) {
  return offset(pooling, p, d, h, w, pooling.depth.in, pooling.height.in, pooling.width.in);
}
MMSOFTPOOL_BODY int64_t
output_offset(const Pooling& pooling, int64_t p, int64_t d, int64_t h, int64_t w) {
  return offset(pooling, p, d, h, w, pooling.depth.out, pooling.height.out, pooling.width.out);
}

// Splits the number of an element, in the order of memory, into its plane and position.
struct Position {
  int64_t p, d, h, w;
};
template <typename Int>
MMSOFTPOOL_BODY Position
split(const Pooling& pooling, Int i, int64_t size_d, int64_t size_h, int64_t size_w) {
  Position position;
  Int c = 0;
  if (pooling.layout == Layout::channels_last) {
    c = i % Int(pooling.channels);
    i /= Int(pooling.channels);
  }
  position.w = i % Int(size_w);
  i /= Int(size_w);
  position.h = i % Int(size_h);
  i /= Int(size_h);
  position.d = i % Int(size_d);
  i /= Int(size_d);
  position.p = pooling.layout == Layout::channels_last ? i * pooling.channels + c : i;
  return position;
}
// A division of 64-bit numbers takes about a hundred instructions on a GPU, one of 32 bits twenty.
MMSOFTPOOL_BODY Position
find_position(const Pooling& pooling, int64_t i, int64_t size_d, int64_t size_h, int64_t size_w) {
  return pooling.planes() * size_d * size_h * size_w <= UINT32_MAX
             ? split(pooling, static_cast<uint32_t>(i), size_d, size_h, size_w)
             : split(pooling, i, size_d, size_h, size_w);
}

// From a column to the next.
MMSOFTPOOL_BODY int64_t column_step(const Pooling& pooling) {
  return pooling.layout == Layout::channels_last ? pooling.channels : 1;
}

// The taps k of an axis that lie inside the input for output o: a range, since taps ascend.
struct Range {
  int64_t begin, end;
};
MMSOFTPOOL_BODY Range taps_inside(const Axis& axis, int64_t o) {
  const int64_t first = axis.first_input(o);
  Range range;
  if (axis.dilation == 1) {
    range.begin = first >= 0 ? 0 : -first;
    range.end = axis.in - first < axis.kernel_size ? axis.in - first : axis.kernel_size;
    return range;
  }
  range.begin = first >= 0 ? 0 : (-first + axis.dilation - 1) / axis.dilation;
  const int64_t room = axis.in - 1 - first;
  range.end = room < 0 ? 0 : room / axis.dilation + 1;
  range.end = range.end < axis.kernel_size ? range.end : axis.kernel_size;
  return range;
}

// Calls visit(x) for the taps of the window of an output.
template <typename T, typename Visit>
MMSOFTPOOL_BODY void for_each_tap(
    const Pooling& pooling, const T* input, const Position& position, const Visit& visit) {
  const Range rd = taps_inside(pooling.depth, position.d);
  const Range rh = taps_inside(pooling.height, position.h);
  const Range rw = taps_inside(pooling.width, position.w);
  const int64_t step = pooling.width.dilation * column_step(pooling);
  for (int64_t kd = rd.begin; kd < rd.end; ++kd) {
    for (int64_t kh = rh.begin; kh < rh.end; ++kh) {
      const T* tap =
          input + input_offset(
                      pooling, position.p,
                      pooling.depth.first_input(position.d) + kd * pooling.depth.dilation,
                      pooling.height.first_input(position.h) + kh * pooling.height.dilation,
                      pooling.width.first_input(position.w) + rw.begin * pooling.width.dilation);
      for (int64_t kw = rw.begin; kw < rw.end; ++kw) {
        visit(Compute<T>(*tap));
        tap += step;
      }
    }
  }
}

template <typename T>
MMSOFTPOOL_BODY Window<Compute<T>> window_of(
    const Pooling& pooling, const Exponent<Compute<T>>& exponent, const T* input,
    const Position& position) {
  using A = Compute<T>;
  A max = Window<A>::lowest;
  for_each_tap(pooling, input, position, [&](A x) { max = Window<A>::update_max(max, x); });
  Window<A> window(exponent, max * exponent.unit);
  for_each_tap(pooling, input, position, [&](A x) { window.add(x); });
  return window;
}

// Thread i makes output i.
template <typename T>
MMSOFTPOOL_BODY void forward_generic(
    const Pooling& pooling, const Exponent<Compute<T>>& exponent, const T* input, T* output,
    int64_t i) {
  const Position position =
      find_position(pooling, i, pooling.depth.out, pooling.height.out, pooling.width.out);
  output[i] = T(window_of(pooling, exponent, input, position).output());
}

// The backward takes two steps, so that no two threads add to the same number. First thread i
// writes what the gradients of the taps of window i need, three numbers, to the workspace.
template <typename T>
MMSOFTPOOL_BODY void summarize_window(
    const Pooling& pooling, const Exponent<Compute<T>>& exponent, const T* grad_output,
    const T* input, Compute<T>* workspace, int64_t i) {
  const Position position =
      find_position(pooling, i, pooling.depth.out, pooling.height.out, pooling.width.out);
  const auto window = window_of(pooling, exponent, input, position);
  workspace[3 * i] = window.max;
  workspace[3 * i + 1] = window.scale(Compute<T>(grad_output[i]));
  workspace[3 * i + 2] = window.offset();
}

// The outputs o of an axis that have input i as a tap are those of a range with
// (i + padding - o * stride) divisible by the dilation.
MMSOFTPOOL_BODY Range outputs_around(const Axis& axis, int64_t i) {
  const int64_t last = i + axis.padding;
  const int64_t first = last - (axis.kernel_size - 1) * axis.dilation;
  Range range;
  range.begin = first <= 0 ? 0 : (first + axis.stride - 1) / axis.stride;
  range.end = last / axis.stride + 1;
  range.end = range.end < axis.out ? range.end : axis.out;
  return range;
}
MMSOFTPOOL_BODY bool is_tap(const Axis& axis, int64_t o, int64_t i) {
  return axis.dilation == 1 || (i - axis.first_input(o)) % axis.dilation == 0;
}

// Then thread i gathers the gradient of input i from the windows around it.
template <typename T>
MMSOFTPOOL_BODY void backward_generic(
    const Pooling& pooling, const Exponent<Compute<T>>& exponent, const Compute<T>* workspace,
    const T* input, T* grad_input, int64_t i) {
  using A = Compute<T>;
  const Position position =
      find_position(pooling, i, pooling.depth.in, pooling.height.in, pooling.width.in);
  const Range rd = outputs_around(pooling.depth, position.d);
  const Range rh = outputs_around(pooling.height, position.h);
  const Range rw = outputs_around(pooling.width, position.w);
  const A x = A(input[i]);
  A grad = 0;
  const int64_t step = 3 * column_step(pooling);
  for (int64_t d = rd.begin; d < rd.end; ++d) {
    for (int64_t h = rh.begin; h < rh.end; ++h) {
      if (!is_tap(pooling.depth, d, position.d) || !is_tap(pooling.height, h, position.h)) {
        continue;
      }
      const A* summary = workspace + 3 * output_offset(pooling, position.p, d, h, rw.begin);
      for (int64_t w = rw.begin; w < rw.end; ++w) {
        if (is_tap(pooling.width, w, position.w)) {
          const Window<A> window(exponent, summary[0]);
          grad += summary[1] * window.share(x, summary[2], pooling.gradient);
        }
        summary += step;
      }
    }
  }
  grad_input[i] = T(grad);
}

}  // namespace mmsoftpool::cuda
