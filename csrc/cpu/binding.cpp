// Registers the CPU kernels with PyTorch's dispatcher. The schema, the autograd formulas and the
// argument checks that a user sees are in mmsoftpool/ops.
#include "../binding.h"

#include "soft_pool.h"

namespace mmsoftpool::cpu {
namespace {

// About as much work as is worth handing to another thread, counted in taps.
constexpr int64_t taps_per_task = 1 << 15;

template <typename Body>
void for_each_item(const Geometry& g, int64_t items, const Body& body) {
  if (items == 0) {
    return;
  }
  const int64_t taps = g.planes() * g.out_plane() / items * g.taps();
  const int64_t grain = std::max<int64_t>(1, taps_per_task / std::max<int64_t>(1, taps));
  parallel_for(0, items, grain, body);
}

// Calls body(pointer type) for the tensor's dtype.
template <typename Body>
void with_dtype(const Tensor& t, const Body& body) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<Half*>(nullptr));
    default:  // Call has refused all others
      return body(static_cast<BFloat16*>(nullptr));
  }
}

Tensor soft_pool(
    const Tensor& input, const Ints& kernel_size, const Ints& stride, const Ints& padding,
    const Ints& dilation, bool ceil_mode, double alpha, const std::string& gradient) {
  const Call call(input, kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient);
  const Geometry& g = call.geometry;
  const Tensor in = call.laid_out(input);
  const Tensor output = call.empty_output();
  with_dtype(in, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const from = static_cast<const T*>(in.data_ptr());
    T* const to = static_cast<T*>(output.data_ptr());
    for_each_item(g, forward_items(g), [&](int64_t begin, int64_t end) {
      pool_forward(g, from, to, begin, end);
    });
  });
  return output;
}

Tensor soft_pool_backward(
    const Tensor& grad_output, const Tensor& input, const Ints& kernel_size, const Ints& stride,
    const Ints& padding, const Ints& dilation, bool ceil_mode, double alpha,
    const std::string& gradient) {
  const Call call(input, kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient);
  call.check_grad_output(grad_output);
  Geometry g = call.geometry;
  g.channel_block = channel_block(g, get_num_threads());
  const Tensor in = call.laid_out(input);
  const Tensor grad_out = call.laid_out(grad_output);
  const Tensor grad_input = call.empty_input();
  with_dtype(in, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const from = static_cast<const T*>(in.data_ptr());
    const T* const grad = static_cast<const T*>(grad_out.data_ptr());
    T* const to = static_cast<T*>(grad_input.data_ptr());
    for_each_item(g, backward_items(g), [&](int64_t begin, int64_t end) {
      pool_backward(g, grad, from, to, begin, end);
    });
  });
  return grad_input;
}

}  // namespace
}  // namespace mmsoftpool::cpu

MMSOFTPOOL_LIBRARY_IMPL(mmsoftpool, CPU, library) {
  library.impl("soft_pool", MMSOFTPOOL_KERNEL(&mmsoftpool::cpu::soft_pool));
  library.impl("soft_pool_backward", MMSOFTPOOL_KERNEL(&mmsoftpool::cpu::soft_pool_backward));
}
