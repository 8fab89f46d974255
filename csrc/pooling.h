// The arguments and sizes of a pooling, for every backend. No torch in here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace mmsoftpool {

// One spatial axis. Output o covers the inputs first_input(o) + k * dilation, k in [0, taps(o));
// those outside [0, in) are absent from the window: they have no weight.
struct Axis {
  int64_t in = 1;
  int64_t out = 1;
  int64_t kernel_size = 1;
  int64_t stride = 1;
  int64_t padding = 0;  // before the first element; the padding after the last is implied by `out`
  int64_t dilation = 1;
  // Whether the windows are those of adaptive pooling, [floor(o in / out), ceil((o + 1) in / out)),
  // with different sizes; kernel_size is then the largest, and stride, padding and dilation are
  // 1, 0 and 1.
  bool adaptive = false;

  int64_t first_input(int64_t o) const { return adaptive ? o * in / out : o * stride - padding; }
  int64_t taps(int64_t o) const {
    return adaptive ? ((o + 1) * in + out - 1) / out - first_input(o) : kernel_size;
  }

  int64_t span() const { return (kernel_size - 1) * dilation + 1; }
};

// Order of the axes in memory: (batch, channels, depth, height, width), or channels last.
enum class Layout { contiguous, channels_last };

// 'exact' is the derivative of the forward, g w_i (1 + alpha (x_i - y)); 'paper' is section 3.2 of
// the paper, the weight alone, g w_i.
enum class Gradient { exact, paper };

// A pooling of a batch of volumes, as Pooling in mmsoftpool/ops/pooling.py, with the sizes of the
// tensors. 1d and 2d pools leave the leading axes at their defaults.
struct Pooling {
  Layout layout = Layout::contiguous;
  int64_t batch = 0;
  int64_t channels = 0;
  Axis depth, height, width;
  double alpha = 1;  // the weights are softmax(alpha x); finite, at least 0
  Gradient gradient = Gradient::exact;

  int64_t planes() const { return batch * channels; }
  int64_t in_plane() const { return depth.in * height.in * width.in; }
  int64_t out_plane() const { return depth.out * height.out * width.out; }
  int64_t taps() const {  // of the largest window
    return depth.kernel_size * height.kernel_size * width.kernel_size;
  }
  bool is_adaptive() const { return depth.adaptive || height.adaptive || width.adaptive; }
};

// Output size of an axis as torch's own pools have it; less than 1 is an error. In ceil_mode a
// last, incomplete window counts if it starts inside the input or the padding before it, so that it
// has a tap there. Sizes up to 2^62 and arguments below 2^31 do not overflow.
inline int64_t output_size(const Axis& axis, int64_t padding_after, bool ceil_mode) {
  const int64_t after =
      ceil_mode ? std::min(padding_after + axis.stride, axis.span()) - 1 : padding_after;
  const int64_t room = axis.in + axis.padding + after - axis.span();
  return room < 0 ? 0 : room / axis.stride + 1;
}

// An axis of adaptive pooling. Where the output size divides the input's, all windows are equal.
inline Axis adaptive_axis(int64_t in, int64_t out) {
  Axis axis;
  axis.in = in;
  axis.out = out;
  axis.adaptive = in % out != 0;
  // The size of window o is ceil((o in % out + in) / out), and the largest remainder out - gcd.
  axis.kernel_size = (in - std::gcd(in, out) + out - 1) / out + 1;
  axis.stride = axis.adaptive ? 1 : in / out;
  return axis;
}

// Cuts the taps that no window has inside the input, so that a kernel larger than the map takes no
// more time and memory than its taps. Every window keeps those that it has.
inline void crop_kernel(Axis& axis) {
  const int64_t last_window = (axis.out - 1) * axis.stride - axis.padding;
  const int64_t absent = last_window < 0 ? (-last_window - 1) / axis.dilation + 1 : 0;
  const int64_t first = std::min(absent, axis.padding / axis.dilation);  // keeps padding >= 0
  const int64_t last = std::min(axis.kernel_size - 1, (axis.in - 1 + axis.padding) / axis.dilation);
  axis.kernel_size = std::max(last - first, int64_t(0)) + 1;
  axis.padding -= first * axis.dilation;
}

}  // namespace mmsoftpool
