// What differs between the two C++ interfaces of PyTorch that a library can be built on; everything
// else in the bindings is the same for both.
//
// The stable ABI (torch >= 2.10) gives one library for every later torch and every Python. ATen,
// with MMSOFTPOOL_ATEN defined, is there for older versions; such a library fits the torch that it
// was built for.
#pragma once

#include <optional>
#include <string>
#include <vector>

#ifdef MMSOFTPOOL_ATEN

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
#ifdef USE_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

#define MMSOFTPOOL_CHECK TORCH_CHECK
#define MMSOFTPOOL_LIBRARY_IMPL TORCH_LIBRARY_IMPL
#define MMSOFTPOOL_KERNEL TORCH_FN

namespace mmsoftpool {

using at::MemoryFormat;
using at::ScalarType;
using at::Tensor;
using c10::DeviceGuard;
using Device = at::Device;

inline Tensor contiguous(const Tensor& t, MemoryFormat format) { return t.contiguous(format); }

inline Tensor empty(
    const std::vector<int64_t>& sizes, ScalarType dtype, Device device, MemoryFormat format) {
  return at::empty(sizes, at::TensorOptions().dtype(dtype).device(device), format);
}

// A tensor of the dtype and on the device of another.
inline Tensor empty_strided(
    const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  return at::empty_strided(sizes, strides, like.options());
}

template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  at::parallel_for(begin, end, grain, body);
}

inline int64_t get_num_threads() { return at::get_num_threads(); }

#ifdef USE_CUDA
inline cudaStream_t current_stream(Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index());
}
#endif

}  // namespace mmsoftpool

#else

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#define MMSOFTPOOL_CHECK STD_TORCH_CHECK
#define MMSOFTPOOL_LIBRARY_IMPL STABLE_TORCH_LIBRARY_IMPL
#define MMSOFTPOOL_KERNEL TORCH_BOX

namespace mmsoftpool {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::get_num_threads;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using Device = torch::stable::Device;

// The text of torch's last error, from torch 2.13 on; null before. Looked up at run time, so that
// the library loads with torch 2.10.
inline const char* last_error() {
  using Function = const char* (*)();
  static const auto function =
      reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return function != nullptr ? function() : nullptr;
}

// Calls torch for a tensor. Its own error would not tell that memory ran out, which callers look
// for in the text.
template <typename Call>
Tensor allocate(const Call& call) {
  try {
    return call();
  } catch (const std::exception&) {
    const char* const text = last_error();
    MMSOFTPOOL_CHECK(
        false, "soft_pool: no tensor: ",
        text != nullptr
            ? text
            : "out of memory, or an error that torch before 2.13 prints but does not pass on");
    throw;
  }
}

inline Tensor contiguous(const Tensor& t, MemoryFormat format) {
  return allocate([&] { return torch::stable::contiguous(t, format); });
}

inline Tensor empty(
    const std::vector<int64_t>& sizes, ScalarType dtype, Device device, MemoryFormat format) {
  return allocate([&] {
    return torch::stable::empty(sizes, dtype, std::nullopt, device, std::nullopt, format);
  });
}

// A tensor of the dtype and on the device of another. Calls torch directly: looking the operator up
// by name takes several times as long.
inline Tensor empty_strided(
    const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  return allocate([&] {
    const AtenTensorHandle t = like.get();
    int32_t dtype, device, index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &index));
    AtenTensorHandle empty;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        sizes.size(), sizes.data(), strides.data(), dtype, device, index, &empty));
    return Tensor(empty);
  });
}

#ifdef USE_CUDA
struct DeviceGuard : torch::stable::accelerator::DeviceGuard {
  explicit DeviceGuard(Device device) : torch::stable::accelerator::DeviceGuard(device.index()) {}
};

inline cudaStream_t current_stream(Device device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace mmsoftpool

#endif
