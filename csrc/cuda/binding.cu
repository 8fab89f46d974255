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

}  // namespace
}  // namespace mmsoftpool::cuda

MMSOFTPOOL_LIBRARY_IMPL(mmsoftpool, CUDA, library) {
  mmsoftpool::Operators<mmsoftpool::cuda::forward, mmsoftpool::cuda::backward>::register_in(
      library);
}
