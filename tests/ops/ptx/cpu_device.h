// What csrc/torch_abi.h has for CUDA, for tensors of the CPU.
#pragma once

#include <cstdio>

#include "binding.h"
#include "checked.h"

extern "C" const char* take_faults();

namespace mmsoftpool {

struct DeviceGuard {
  explicit DeviceGuard(Device) {}
};
inline cudaStream_t current_stream(Device) { return nullptr; }

inline cudaError_t check_faults(cudaError_t error) {
  const char* const faults = take_faults();
  std::fputs(faults, stderr);
  return *faults == 0 ? error : cudaErrorUnknown;
}

}  // namespace mmsoftpool
