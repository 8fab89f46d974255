// The arguments and sizes of a pooling, for every backend. No torch in here.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define MMSOFTPOOL_HOST_DEVICE __host__ __device__
#else
#define MMSOFTPOOL_HOST_DEVICE
#endif

namespace mmsoftpool {

// One spatial axis. Output o covers the inputs o * stride - padding + k * dilation, k in
// [0, kernel_size); those outside [0, in) are absent from the window: they have no weight.
struct Axis {
  int64_t in = 1;
  int64_t out = 1;
  int64_t kernel_size = 1;
  int64_t stride = 1;
  int64_t padding = 0;  // before the first element; the padding after the last is implied by `out`
  int64_t dilation = 1;

  MMSOFTPOOL_HOST_DEVICE int64_t first_input(int64_t o) const { return o * stride - padding; }

  MMSOFTPOOL_HOST_DEVICE int64_t span() const { return (kernel_size - 1) * dilation + 1; }
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

  MMSOFTPOOL_HOST_DEVICE int64_t planes() const { return batch * channels; }
  MMSOFTPOOL_HOST_DEVICE int64_t in_plane() const { return depth.in * height.in * width.in; }
  MMSOFTPOOL_HOST_DEVICE int64_t out_plane() const { return depth.out * height.out * width.out; }
  MMSOFTPOOL_HOST_DEVICE int64_t taps() const {
    return depth.kernel_size * height.kernel_size * width.kernel_size;
  }
};

// Output size of an axis as torch's own pools have it: in ceil_mode the last window starts inside
// the input or the padding before it. Sizes up to 2^62 and arguments below 2^31 do not overflow.
inline int64_t output_size(const Axis& axis, int64_t padding_after, bool ceil_mode) {
  const int64_t room = axis.in + axis.padding + padding_after - axis.span();
  if (room < 0) {
    return 0;
  }
  int64_t out = (room + (ceil_mode ? axis.stride - 1 : 0)) / axis.stride + 1;
  if (ceil_mode && (out - 1) * axis.stride >= axis.in + axis.padding) {
    --out;
  }
  return out;
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
