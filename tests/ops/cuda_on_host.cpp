// Runs the CUDA threads of csrc/cuda one after the other on the host.
#include <vector>

#include "../../csrc/cuda/generic.h"
#include "../../csrc/cuda/strip.h"

using namespace mmsoftpool;
using namespace mmsoftpool::cuda;

namespace {

template <typename S>
void run_strip(
    const Pooling& pooling, int64_t rows, bool packed, const float* grad_output, const float* input,
    float* output, float* grad_input) {
  const auto forward = S::forward_arguments(pooling, rows, packed);
  for (int64_t i = forward.threads; i-- > 0;) {
    S::forward(forward, input, output, static_cast<uint32_t>(i));
  }
  const auto backward = S::backward_arguments(pooling, rows, packed);
  for (int64_t i = backward.threads; i-- > 0;) {
    S::backward(backward, grad_output, input, grad_input, static_cast<uint32_t>(i));
  }
}

// shape: layout (1 for channels last), batch, channels, and in, out, kernel_size, stride, padding,
// dilation of depth, height and width.
Pooling make_pooling(const int64_t* shape, double alpha, int exact) {
  Pooling pooling;
  pooling.layout = shape[0] ? Layout::channels_last : Layout::contiguous;
  pooling.batch = shape[1];
  pooling.channels = shape[2];
  Axis* const axes[] = {&pooling.depth, &pooling.height, &pooling.width};
  for (int i = 0; i < 3; ++i) {
    const int64_t* const a = shape + 3 + 6 * i;
    *axes[i] = Axis{a[0], a[1], a[2], a[3], a[4], a[5]};
  }
  pooling.alpha = alpha;
  pooling.gradient = exact ? Gradient::exact : Gradient::paper;
  return pooling;
}

struct Bits16 {
  uint16_t bits;
};

}  // namespace

// Whether a pooling of aligned 16-bit tensors has a strip.
extern "C" int has_strip(const int64_t* shape) {
  return with_strip<Bits16>(make_pooling(shape, 1, 1), true, [](auto) {});
}

// Returns whether the pooling has a strip, which is then what ran.
extern "C" int run(
    const int64_t* shape, double alpha, int exact, int64_t rows, int force_generic,
    const float* grad_output, const float* input, float* output, float* grad_input) {
  const Pooling pooling = make_pooling(shape, alpha, exact);
  const bool aligned =
      (reinterpret_cast<uintptr_t>(grad_output) | reinterpret_cast<uintptr_t>(input) |
       reinterpret_cast<uintptr_t>(output) | reinterpret_cast<uintptr_t>(grad_input)) %
          16 ==
      0;
  if (!force_generic && with_strip<float>(pooling, aligned, [&](auto strip) {
        using S = decltype(strip);
        run_strip<S>(
            pooling, rows, is_packed<float>(pooling, aligned), grad_output, input, output,
            grad_input);
      })) {
    return 1;
  }
  const int64_t outputs = pooling.planes() * pooling.out_plane();
  const auto exponent = make_exponent<float>(pooling);
  std::vector<float> workspace(3 * outputs);
  for (int64_t i = outputs; i-- > 0;) {
    forward_generic(pooling, exponent, input, output, i);
    summarize_window(pooling, exponent, grad_output, input, workspace.data(), i);
  }
  for (int64_t i = pooling.planes() * pooling.in_plane(); i-- > 0;) {
    backward_generic(pooling, exponent, workspace.data(), input, grad_input, i);
  }
  return 0;
}

// The strips of the 16-bit types are twice as wide; here with float.
extern "C" void run_wide(
    const int64_t* shape, double alpha, int exact, int64_t rows, const float* grad_output,
    const float* input, float* output, float* grad_input) {
  const Pooling pooling = make_pooling(shape, alpha, exact);
  const bool packed = pooling.width.in % 8 == 0;
  const auto run_in = [&](auto strip) {
    run_strip<decltype(strip)>(pooling, rows, packed, grad_output, input, output, grad_input);
  };
  if (pooling.width.kernel_size == 2) {
    run_in(Strip<float, 2, 0, 4, 1>());
  } else if (pooling.width.padding == 0) {
    run_in(Strip<float, 3, 0, 4, 1>());
  } else {
    run_in(Strip<float, 3, 1, 4, 1>());
  }
}
