// Launches with the tensors declared to the machine, which checks every access.
#pragma once

#include <sys/mman.h>

#include "soft_pool.h"

extern "C" {
void clear_tensors();
void add_tensor(const void* begin, uint64_t size, bool is_written);
int64_t count_unwritten(int tensor);
const char* get_last_kernel();
}

namespace mmsoftpool::cuda {

// Memory of which what nobody touches takes none.
template <typename A>
struct Sparse {
  size_t size;
  A* begin;

  explicit Sparse(int64_t numbers)
      : size(numbers * sizeof(A) + 64),
        begin(
            static_cast<A*>(mmap(
                nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                -1, 0))) {}
  Sparse(const Sparse&) = delete;
  ~Sparse() { munmap(begin, size); }
};

template <typename T>
cudaError_t checked_forward(
    const Pooling& pooling, const T* input, T* output, Compute<T>* workspace, cudaStream_t stream) {
  clear_tensors();
  add_tensor(output, sizeof(T) * pooling.planes() * pooling.out_plane(), true);
  add_tensor(input, sizeof(T) * pooling.planes() * pooling.in_plane(), false);
  const int64_t numbers = forward_workspace(pooling);
  if (numbers > 0) {
    add_tensor(workspace, sizeof(Compute<T>) * numbers, true);
  }
  const cudaError_t error = pool_forward(pooling, input, output, workspace, stream);
  return error == cudaSuccess && count_unwritten(0) != 0 ? cudaErrorUnknown : error;
}

template <typename T>
cudaError_t checked_backward(
    const Pooling& pooling, const T* grad_output, const T* input, T* grad_input,
    Compute<T>* workspace, cudaStream_t stream) {
  clear_tensors();
  add_tensor(grad_input, sizeof(T) * pooling.planes() * pooling.in_plane(), true);
  add_tensor(grad_output, sizeof(T) * pooling.planes() * pooling.out_plane(), false);
  add_tensor(input, sizeof(T) * pooling.planes() * pooling.in_plane(), false);
  const int64_t numbers = backward_workspace(pooling, grad_output, input, grad_input);
  add_tensor(workspace, sizeof(Compute<T>) * numbers, true);
  const cudaError_t error =
      pool_backward(pooling, grad_output, input, grad_input, workspace, stream);
  return error == cudaSuccess && count_unwritten(0) != 0 ? cudaErrorUnknown : error;
}

}  // namespace mmsoftpool::cuda
