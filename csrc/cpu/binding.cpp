// Registers the CPU kernels with PyTorch's dispatcher. The schema, the autograd formulas and the
// argument checks that a user sees are in mmsoftpool/ops.
#include "../binding.h"

#include <sys/mman.h>

#include <cstdlib>

#include "soft_pool.h"

namespace mmsoftpool::cpu {
namespace {

// About as much work as is worth handing to another thread, counted in taps.
constexpr int64_t taps_per_task = 1 << 15;

// Asks for huge pages behind a tensor that nothing has been written to yet. The C library takes as
// much memory as this from the system each time; to map it in pages of 4 KiB would take about as
// long as the pooling. NumPy does the same. A system without huge pages refuses, which changes
// nothing. Where memory is fragmented the system may first move other pages out of the way:
// MMSOFTPOOL_HUGE_PAGES=0 turns it off.
void use_huge_pages(const Tensor& tensor, int64_t element_size) {
  static const char* const variable = std::getenv("MMSOFTPOOL_HUGE_PAGES");
  static const bool off = variable != nullptr && variable[0] == '0';
  constexpr uintptr_t huge_page = 1 << 21;
  constexpr int64_t large = 32 << 20;  // the largest mmap threshold of glibc
  const int64_t bytes = tensor.numel() * element_size;
  if (bytes >= large && !off) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    const uintptr_t first = (begin + huge_page - 1) / huge_page * huge_page;
    const uintptr_t last = (begin + bytes) / huge_page * huge_page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
}

template <typename Body>
void for_each_item(const Pooling& pooling, int64_t items, const Body& body) {
  if (items == 0) {
    return;
  }
  const int64_t taps = pooling.planes() * pooling.out_plane() / items * pooling.taps();
  const int64_t grain = std::max<int64_t>(1, taps_per_task / std::max<int64_t>(1, taps));
  parallel_for(0, items, grain, body);
}

Tensor forward(const PoolArguments& arguments, const Tensor& input) {
  const Pooling& pooling = arguments.pooling;
  const Tensor in = arguments.in_layout(input);
  const Tensor output = arguments.empty_output();
  with_dtype<Half, BFloat16>(in, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const x = static_cast<const T*>(in.data_ptr());
    T* const y = static_cast<T*>(output.data_ptr());
    use_huge_pages(output, sizeof(T));
    for_each_item(pooling, forward_items(pooling), [&](int64_t begin, int64_t end) {
      pool_forward(pooling, x, y, begin, end);
    });
  });
  return output;
}

Tensor backward(const PoolArguments& arguments, const Tensor& grad_output, const Tensor& input) {
  arguments.check_grad_output(grad_output);
  const Pooling& pooling = arguments.pooling;
  const int64_t block = channel_block(pooling, get_num_threads());
  const Tensor in = arguments.in_layout(input);
  const Tensor grad_out = arguments.in_layout(grad_output);
  const Tensor grad_input = arguments.empty_input();
  with_dtype<Half, BFloat16>(in, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const x = static_cast<const T*>(in.data_ptr());
    const T* const grad_y = static_cast<const T*>(grad_out.data_ptr());
    T* const grad_x = static_cast<T*>(grad_input.data_ptr());
    use_huge_pages(grad_input, sizeof(T));
    for_each_item(pooling, backward_items(pooling, block), [&](int64_t begin, int64_t end) {
      pool_backward(pooling, block, grad_y, x, grad_x, begin, end);
    });
  });
  return grad_input;
}

}  // namespace
}  // namespace mmsoftpool::cpu

// The name of the instruction set in use, as ATEN_CPU_CAPABILITY has it; for Python, by ctypes.
extern "C" __attribute__((visibility("default"))) const char* mmsoftpool_cpu_capability() {
  using mmsoftpool::cpu::Capability;
  const Capability capability = mmsoftpool::cpu::capability();
  return capability == Capability::avx512 ? "avx512"
         : capability == Capability::avx2 ? "avx2"
                                          : "default";
}

MMSOFTPOOL_LIBRARY_IMPL(mmsoftpool, CPU, library) {
  mmsoftpool::Operators<mmsoftpool::cpu::forward, mmsoftpool::cpu::backward>::register_in(library);
}
