// The launch code of the CUDA kernels as it is, for the machine of machine.cpp, and what tests
// call.
#include <string>
#include <vector>

#include "../pooling_argument.h"
#include "soft_pool.cu"

using namespace mmsoftpool;
using namespace mmsoftpool::cuda;

extern "C" {
void clear_tensors();
void add_tensor(const void* begin, uint64_t size, bool is_written);
int64_t count_unwritten(int tensor);
const char* get_last_kernel();
}

namespace {

// As Kind in cuda_on_host.cpp.
int get_kind() {
  const std::string name = get_last_kernel();
  return name.find("ring") != name.npos ? 2 : name.find("strip") != name.npos ? 1 : 0;
}

// Aligned as torch's are, and declared.
template <typename A>
struct Workspace {
  std::vector<A> numbers;
  A* begin;

  explicit Workspace(int64_t size) : numbers(size + 64 / sizeof(A)) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(numbers.data());
    begin = reinterpret_cast<A*>((address + 63) / 64 * 64);
    add_tensor(begin, size * sizeof(A), true);
  }
};

template <typename T>
int run_on(
    const Pooling& pooling, const void* grad_output, const void* input, void* output,
    void* grad_input) {
  const uint64_t in = sizeof(T) * pooling.planes() * pooling.in_plane();
  const uint64_t out = sizeof(T) * pooling.planes() * pooling.out_plane();
  const T* const x = static_cast<const T*>(input);
  const T* const grad_y = static_cast<const T*>(grad_output);
  T* const grad_x = static_cast<T*>(grad_input);
  clear_tensors();
  add_tensor(output, out, true);
  add_tensor(input, in, false);
  Workspace<Compute<T>> slices(forward_workspace(pooling));
  T* const y = static_cast<T*>(output);
  if (pool_forward(pooling, x, y, slices.begin, nullptr) != cudaSuccess ||
      count_unwritten(0) != 0) {
    return -2;
  }
  const int kind = get_kind();
  clear_tensors();
  add_tensor(grad_input, in, true);
  add_tensor(grad_output, out, false);
  add_tensor(input, in, false);
  Workspace<Compute<T>> workspace(backward_workspace(pooling, grad_y, x, grad_x));
  if (pool_backward(pooling, grad_y, x, grad_x, workspace.begin, nullptr) != cudaSuccess ||
      count_unwritten(0) != 0) {
    return -3;
  }
  return kind == get_kind() ? kind : -1;
}

}  // namespace

// As in cuda_on_host.cpp, with the launch code's own choice of rows and indices. -2 and -3 for a
// failed launch or results that were not written.
extern "C" __attribute__((visibility("default"))) int run_threads(
    int dtype, const int64_t* shape, double alpha, int exact, int64_t, int, const void* grad_output,
    const void* input, void* output, void* grad_input) {
  const Pooling pooling = make_pooling(shape, alpha, exact);
  const auto run = [&](auto type) {
    return run_on<decltype(type)>(pooling, grad_output, input, output, grad_input);
  };
#ifdef MMSOFTPOOL_FLOAT_ALONE
  return dtype == 0 ? run(float()) : -4;
#else
  return dtype == 0   ? run(float())
         : dtype == 1 ? run(__half())
         : dtype == 2 ? run(__nv_bfloat16())
                      : run(double());
#endif
}
