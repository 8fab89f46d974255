// The launch code of the CUDA kernels as it is, for the machine of machine.cpp, and what tests
// call.
#include <string>

#include "../pooling_argument.h"
#include "checked.h"
#include "soft_pool.cu"

using namespace mmsoftpool;
using namespace mmsoftpool::cuda;

namespace {

// As Kind in cuda_on_host.cpp.
int get_kind() {
  const std::string name = get_last_kernel();
  return name.find("4Ring") != name.npos ? 2 : name.find("5Strip") != name.npos ? 1 : 0;
}

template <typename T>
int run_on(
    const Pooling& pooling, bool only_forward, const void* grad_output, const void* input,
    void* output, void* grad_input) {
  const T* const x = static_cast<const T*>(input);
  const T* const grad_y = static_cast<const T*>(grad_output);
  T* const grad_x = static_cast<T*>(grad_input);
  Sparse<Compute<T>> slices(forward_workspace(pooling));
  if (checked_forward(pooling, x, static_cast<T*>(output), slices.begin, nullptr) != cudaSuccess) {
    return -2;
  }
  const int kind = get_kind();
  if (only_forward) {
    return kind;
  }
  Sparse<Compute<T>> workspace(backward_workspace(pooling, grad_y, x, grad_x));
  if (checked_backward(pooling, grad_y, x, grad_x, workspace.begin, nullptr) != cudaSuccess) {
    return -3;
  }
  return kind == get_kind() ? kind : -1;
}

}  // namespace

// As in cuda_on_host.cpp, with the launch code's own choice of rows and indices. -2 and -3 for a
// failed launch or results that were not written.
extern "C" __attribute__((visibility("default"))) int run_threads(
    int dtype, const int64_t* shape, double alpha, int exact, int64_t, int only_forward,
    const void* grad_output, const void* input, void* output, void* grad_input) {
  const Pooling pooling = make_pooling(shape, alpha, exact);
  const auto run = [&](auto type) {
    return run_on<decltype(type)>(pooling, only_forward, grad_output, input, output, grad_input);
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
