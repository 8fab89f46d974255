// The shape arithmetic of a pooling, shared by every backend. No torch in here.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MMSOFTPOOL_HOST_DEVICE __host__ __device__
#else
#define MMSOFTPOOL_HOST_DEVICE
#endif

namespace mmsoftpool {

// One spatial axis. Output o covers the inputs o * stride - pad + k * dilation, k in [0, kernel);
// those outside [0, in) are absent from the window: they have no weight.
struct Axis {
  int64_t in = 1;
  int64_t out = 1;
  int64_t kernel = 1;
  int64_t stride = 1;
  int64_t pad = 0;  // before the first element; what comes after the last needs no number here
  int64_t dilation = 1;

  MMSOFTPOOL_HOST_DEVICE int64_t first_input(int64_t o) const { return o * stride - pad; }

  MMSOFTPOOL_HOST_DEVICE int64_t span() const { return (kernel - 1) * dilation + 1; }
};

// Output size as torch's own pools have it: in ceil_mode the last window starts inside the input
// or the padding before it.
inline int64_t output_size(
    int64_t in, int64_t kernel, int64_t stride, int64_t pad_before, int64_t pad_after,
    int64_t dilation, bool ceil_mode) {
  const int64_t span = in + pad_before + pad_after - dilation * (kernel - 1) - 1;
  if (span < 0) {
    return 0;
  }
  int64_t out = (span + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (ceil_mode && (out - 1) * stride >= in + pad_before) {
    --out;
  }
  return out;
}

// How a tensor lies in memory: (batch, channels, depth, height, width), or with the channels last.
enum class Layout { contiguous, channels_last };

// 'exact' is the derivative of the forward, g w_i (1 + alpha (x_i - y)); 'paper' is section 3.2 of
// the paper, the weight alone, g w_i.
enum class Gradient { exact, paper };

// A pooling of a batch of volumes. 1d and 2d pools leave the leading axes at their defaults.
struct Geometry {
  Layout layout = Layout::contiguous;
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t channel_block = 16;  // channels that the CPU's backward takes together, channels last
  Axis depth, height, width;
  double alpha = 1;  // the weights are softmax(alpha x); finite, at least 0
  Gradient gradient = Gradient::exact;

  MMSOFTPOOL_HOST_DEVICE int64_t planes() const { return batch * channels; }
  MMSOFTPOOL_HOST_DEVICE int64_t in_plane() const { return depth.in * height.in * width.in; }
  MMSOFTPOOL_HOST_DEVICE int64_t out_plane() const { return depth.out * height.out * width.out; }
  MMSOFTPOOL_HOST_DEVICE int64_t taps() const {
    return depth.kernel * height.kernel * width.kernel;
  }
};

}  // namespace mmsoftpool
