// Registers the CUDA kernels with PyTorch's dispatcher; see cpu/binding.cpp.
#include "../binding.h"
#include "soft_pool.h"

namespace mmsoftpool::cuda {
namespace {

void check(cudaError_t error) {
  MMSOFTPOOL_CHECK(
      error == cudaSuccess,
      "soft_pool: the CUDA kernel could not be launched: ", cudaGetErrorString(error));
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
      return body(static_cast<__half*>(nullptr));
    default:  // Call has refused all others
      return body(static_cast<__nv_bfloat16*>(nullptr));
  }
}

Tensor soft_pool(
    const Tensor& input, const Ints& kernel_size, const Ints& stride, const Ints& padding,
    const Ints& dilation, bool ceil_mode, double alpha, const std::string& gradient) {
  const DeviceGuard guard(input.device());
  const Call call(input, kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient);
  const Tensor in = call.laid_out(input);
  const Tensor output = call.empty_output();
  with_dtype(in, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check(pool_forward(
        call.geometry, static_cast<const T*>(in.data_ptr()), static_cast<T*>(output.data_ptr()),
        current_stream(in.device())));
  });
  return output;
}

Tensor soft_pool_backward(
    const Tensor& grad_output, const Tensor& input, const Ints& kernel_size, const Ints& stride,
    const Ints& padding, const Ints& dilation, bool ceil_mode, double alpha,
    const std::string& gradient) {
  const DeviceGuard guard(input.device());
  const Call call(input, kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient);
  call.check_grad_output(grad_output);
  const Tensor in = call.laid_out(input);
  const Tensor grad_out = call.laid_out(grad_output);
  const Tensor grad_input = call.empty_input();
  with_dtype(in, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const from = static_cast<const T*>(in.data_ptr());
    const T* const grad = static_cast<const T*>(grad_out.data_ptr());
    T* const to = static_cast<T*>(grad_input.data_ptr());
    const Tensor notes = empty(
        {backward_notes(call.geometry, grad, from, to)},
        sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float, in.device(),
        MemoryFormat::Contiguous);
    check(pool_backward(
        call.geometry, grad, from, to, static_cast<Compute<T>*>(notes.data_ptr()),
        current_stream(in.device())));
  });
  return grad_input;
}

}  // namespace
}  // namespace mmsoftpool::cuda

MMSOFTPOOL_LIBRARY_IMPL(mmsoftpool, CUDA, library) {
  library.impl("soft_pool", MMSOFTPOOL_KERNEL(&mmsoftpool::cuda::soft_pool));
  library.impl("soft_pool_backward", MMSOFTPOOL_KERNEL(&mmsoftpool::cuda::soft_pool_backward));
}
