// Runs the CUDA threads of csrc/cuda/soft_pool_body.h one after the other on the host.
#include <vector>

#include "../../csrc/cuda/soft_pool_body.h"

using namespace mmsoftpool;
using namespace mmsoftpool::cuda;

namespace {

template <typename S>
void run_strip(
    const Geometry& g, int64_t rows, bool packed, const float* grad_output, const float* input,
    float* output, float* grad_input) {
  const auto forward = S::forward_arguments(g, rows, packed);
  for (int64_t i = forward.threads; i-- > 0;) {
    S::forward(forward, input, output, static_cast<uint32_t>(i));
  }
  const auto backward = S::backward_arguments(g, rows, packed);
  for (int64_t i = backward.threads; i-- > 0;) {
    S::backward(backward, grad_output, input, grad_input, static_cast<uint32_t>(i));
  }
}

}  // namespace

// shape: layout (1 for channels last), batch, channels, and in, out, kernel, stride, pad, dilation
// of depth, height and width. Returns whether the pooling has a strip, which is then what ran.
extern "C" int run(
    const int64_t* shape, double alpha, int exact, int64_t rows, int force_any,
    const float* grad_output, const float* input, float* output, float* grad_input) {
  Geometry g;
  g.alpha = alpha;
  g.gradient = exact ? Gradient::exact : Gradient::paper;
  g.layout = shape[0] ? Layout::channels_last : Layout::contiguous;
  g.batch = shape[1];
  g.channels = shape[2];
  Axis* const axes[] = {&g.depth, &g.height, &g.width};
  for (int i = 0; i < 3; ++i) {
    const int64_t* const a = shape + 3 + 6 * i;
    *axes[i] = Axis{a[0], a[1], a[2], a[3], a[4], a[5]};
  }
  const bool aligned =
      (reinterpret_cast<uintptr_t>(grad_output) | reinterpret_cast<uintptr_t>(input) |
       reinterpret_cast<uintptr_t>(output) | reinterpret_cast<uintptr_t>(grad_input)) %
          16 ==
      0;
  if (!force_any && with_strip<float>(g, aligned, [&](auto strip) {
        using S = decltype(strip);
        run_strip<S>(g, rows, is_packed<float>(g, aligned), grad_output, input, output, grad_input);
      })) {
    return 1;
  }
  const int64_t outputs = g.planes() * g.out_plane();
  const auto exponent = make_exponent<float>(g);
  std::vector<float> notes(3 * outputs);
  for (int64_t i = outputs; i-- > 0;) {
    forward_any(g, exponent, input, output, i);
    note_window(g, exponent, grad_output, input, notes.data(), i);
  }
  for (int64_t i = g.planes() * g.in_plane(); i-- > 0;) {
    backward_any(g, exponent, notes.data(), input, grad_input, i);
  }
  return 0;
}

// The strips of the 16-bit types are twice as wide; here with float.
extern "C" void run_wide(
    const int64_t* shape, double alpha, int exact, int64_t rows, const float* grad_output,
    const float* input, float* output, float* grad_input) {
  Geometry g;
  g.alpha = alpha;
  g.gradient = exact ? Gradient::exact : Gradient::paper;
  g.batch = shape[1];
  g.channels = shape[2];
  g.height = Axis{shape[9], shape[10], shape[11], shape[12], shape[13], shape[14]};
  g.width = Axis{shape[15], shape[16], shape[17], shape[18], shape[19], shape[20]};
  const bool packed = g.width.in % 8 == 0;
  const auto go = [&](auto strip) {
    run_strip<decltype(strip)>(g, rows, packed, grad_output, input, output, grad_input);
  };
  if (g.width.kernel == 2) {
    go(Strip<float, 2, 0, 4, 1>());
  } else if (g.width.pad == 0) {
    go(Strip<float, 3, 0, 4, 1>());
  } else {
    go(Strip<float, 3, 1, 4, 1>());
  }
}
