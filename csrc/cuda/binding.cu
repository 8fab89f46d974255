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

// The library has a CUDA runtime of its own, which torch's guard does not set.
cudaStream_t stream_of(const Tensor& t) {
  check(cudaSetDevice(t.device().index()));
  return current_stream(t.device());
}

template <typename T>
Tensor make_workspace(int64_t numbers, const Tensor& input) {
  return empty(
      {numbers}, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float, input.device(),
      MemoryFormat::Contiguous);
}

Tensor forward(const PoolArguments& arguments, const Tensor& input) {
  const DeviceGuard guard(input.device());
  const Tensor in = arguments.in_layout(input);
  const Tensor output = arguments.empty_output();
  with_dtype<__half, __nv_bfloat16>(in, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const x = static_cast<const T*>(in.data_ptr());
    T* const y = static_cast<T*>(output.data_ptr());
    const int64_t numbers = forward_workspace(arguments.pooling);
    const Tensor workspace = numbers > 0 ? make_workspace<T>(numbers, in) : output;
    check(pool_forward(
        arguments.pooling, x, y, static_cast<Compute<T>*>(workspace.data_ptr()), stream_of(in)));
  });
  return output;
}

Tensor backward(const PoolArguments& arguments, const Tensor& grad_output, const Tensor& input) {
  const DeviceGuard guard(input.device());
  arguments.check_grad_output(grad_output);
  const Tensor in = arguments.in_layout(input);
  const Tensor grad_out = arguments.in_layout(grad_output);
  const Tensor grad_input = arguments.empty_input();
  with_dtype<__half, __nv_bfloat16>(in, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const x = static_cast<const T*>(in.data_ptr());
    const T* const grad_y = static_cast<const T*>(grad_out.data_ptr());
    T* const grad_x = static_cast<T*>(grad_input.data_ptr());
    const Tensor workspace =
        make_workspace<T>(backward_workspace(arguments.pooling, grad_y, x, grad_x), in);
    check(pool_backward(
        arguments.pooling, grad_y, x, grad_x, static_cast<Compute<T>*>(workspace.data_ptr()),
        stream_of(in)));
  });
  return grad_input;
}

Tensor soft_pool(
    const Tensor& input, const Ints& kernel_size, const Ints& stride, const Ints& padding,
    const Ints& dilation, bool ceil_mode, double alpha, const std::string& gradient) {
  return forward(
      {input, kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient}, input);
}

Tensor soft_pool_backward(
    const Tensor& grad_output, const Tensor& input, const Ints& kernel_size, const Ints& stride,
    const Ints& padding, const Ints& dilation, bool ceil_mode, double alpha,
    const std::string& gradient) {
  return backward(
      {input, kernel_size, stride, padding, dilation, ceil_mode, alpha, gradient}, grad_output,
      input);
}

Tensor adaptive_soft_pool(
    const Tensor& input, const Ints& output_size, double alpha, const std::string& gradient) {
  return forward({input, output_size, alpha, gradient}, input);
}

Tensor adaptive_soft_pool_backward(
    const Tensor& grad_output, const Tensor& input, const Ints& output_size, double alpha,
    const std::string& gradient) {
  return backward({input, output_size, alpha, gradient}, grad_output, input);
}

}  // namespace
}  // namespace mmsoftpool::cuda

MMSOFTPOOL_LIBRARY_IMPL(mmsoftpool, CUDA, library) {
  library.impl("soft_pool", MMSOFTPOOL_KERNEL(&mmsoftpool::cuda::soft_pool));
  library.impl("soft_pool_backward", MMSOFTPOOL_KERNEL(&mmsoftpool::cuda::soft_pool_backward));
  library.impl("adaptive_soft_pool", MMSOFTPOOL_KERNEL(&mmsoftpool::cuda::adaptive_soft_pool));
  library.impl(
      "adaptive_soft_pool_backward",
      MMSOFTPOOL_KERNEL(&mmsoftpool::cuda::adaptive_soft_pool_backward));
}
