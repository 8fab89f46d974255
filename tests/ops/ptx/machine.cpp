// A CUDA runtime that runs the translated kernels on the CPU, a thread after the other, and checks
// what they do to memory: every address lies in a tensor, is aligned to what is moved, and has been
// written before it is read; no two threads of a launch write the same byte, and none reads what
// another one has written.
#include "machine.h"

#include <immintrin.h>
#include <sys/mman.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace {

int rounding = 0;  // 0: right; else pseudo-random errors up to the documented ones
bool descending = false;
uint32_t last_blocks = 0;  // of a grid that run: 0 for all
int device = 0, launch_device = 0;

// y off by up to `ulps` units in the last place.
float approximate(float y, uint32_t key, int ulps) {
  if (rounding == 0 || y == 0 || !std::isfinite(y)) {
    return y;
  }
  const uint32_t hash = (key + static_cast<uint32_t>(rounding)) * 2654435761u >> 12;
  const int error = static_cast<int>(hash % static_cast<uint32_t>(2 * ulps + 1)) - ulps;
  return as<float>(bits(y) + static_cast<uint32_t>(error));
}
float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

}  // namespace

float exp2_approx(float x) {
  x = flush(x);
  // 1 for 0 is documented.
  return x == 0 ? 1 : flush(approximate(float(std::exp2(double(x))), bits(x), 2));
}
float reciprocal_approx(float x) {
  return flush(approximate(float(1 / double(flush(x))), bits(x), 1));
}
double reciprocal_approx(double x) {
  return as<double>(bits(1 / as<double>(bits(x) >> 32 << 32)) >> 32 << 32);
}
float divide_approx(float x, float y) {
  if (std::fabs(y) > 0x1p126f && std::isfinite(y)) {
    return std::isinf(x) ? NAN : x * std::copysign(0.0f, y);
  }
  return approximate(float(double(x) / double(y)), bits(x) * 31 + bits(y), 2);
}
float from_half_to_float(uint16_t x) { return _cvtsh_ss(x); }
uint16_t to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
uint16_t to_bfloat16(float x) {
  const uint32_t word = bits(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

namespace {

// Numbers that are 0 at first. Those that nobody touches take no memory.
template <typename Number>
class Zeros {
 public:
  explicit Zeros(size_t count)
      : size_(count * sizeof(Number)),
        numbers_(
            count == 0 ? nullptr
                       : static_cast<Number*>(mmap(
                             nullptr, size_, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {}
  Zeros(Zeros&& other) : size_(other.size_), numbers_(std::exchange(other.numbers_, nullptr)) {}
  ~Zeros() {
    if (numbers_ != nullptr) {
      munmap(numbers_, size_);
    }
  }
  Number& operator[](size_t i) { return numbers_[i]; }
  const Number& operator[](size_t i) const { return numbers_[i]; }
  void clear() {
    if (numbers_ != nullptr) {
      madvise(numbers_, size_, MADV_DONTNEED);
    }
  }

 private:
  size_t size_;
  Number* numbers_;
};

struct Tensor {
  uint64_t begin, size;
  bool is_written;          // by kernels
  Zeros<uint32_t> writers;  // of its bytes: 0 for none, or the thread + 1
  Zeros<bool> has_value;

  Tensor(uint64_t begin, uint64_t size, bool is_written)
      : begin(begin),
        size(size),
        is_written(is_written),
        writers(is_written ? size : 0),
        has_value(is_written ? size : 0) {}
};
std::vector<Tensor> tensors;
std::string faults;
const Kernel* current;
uint32_t thread_number;
std::map<std::string, int64_t> launches;
std::string last_kernel;

}  // namespace

void report(const char* what, uint64_t address, uint32_t size, int line) {
  if (faults.size() > 4000) {
    return;
  }
  std::string where;
  for (size_t i = 0; i < tensors.size(); ++i) {
    where += " " + std::to_string(static_cast<int64_t>(address - tensors[i].begin)) + " of " +
             std::to_string(tensors[i].size);
  }
  faults += std::string(what) + ", " + std::to_string(size) + " bytes, thread " +
            std::to_string(thread_number) + ", line " + std::to_string(line) + " of the PTX, " +
            (current ? current->name : "no kernel") + "; from the tensors' begins:" + where + "\n";
}

namespace {

Tensor* find(uint64_t address, uint32_t size, const char* what, int line) {
  if (address % size != 0) {
    report("misaligned", address, size, line);
  }
  for (Tensor& tensor : tensors) {
    if (address >= tensor.begin && address + size <= tensor.begin + tensor.size) {
      return &tensor;
    }
  }
  report(what, address, size, line);
  return nullptr;
}

}  // namespace

void Thread::load(uint64_t address, uint32_t size, void* to, int line) const {
  std::memset(to, 0xff, size);
  const Tensor* const tensor = find(address, size, "load out of bounds", line);
  if (!tensor) {
    return;
  }
  if (tensor->is_written) {
    for (uint64_t i = address - tensor->begin; i < address - tensor->begin + size; ++i) {
      if (!tensor->has_value[i]) {
        return report("load of what was never written", address, size, line);
      }
      if (tensor->writers[i] != 0 && tensor->writers[i] != thread_number + 1) {
        return report("load of what another thread wrote", address, size, line);
      }
    }
  }
  std::memcpy(to, reinterpret_cast<const void*>(address), size);
}

void Thread::store(uint64_t address, uint32_t size, const void* from, int line) const {
  Tensor* const tensor = find(address, size, "store out of bounds", line);
  if (!tensor) {
    return;
  }
  if (!tensor->is_written) {
    return report("store to an input", address, size, line);
  }
  for (uint64_t i = address - tensor->begin; i < address - tensor->begin + size; ++i) {
    if (tensor->writers[i] != 0 && tensor->writers[i] != thread_number + 1) {
      return report("store over what another thread wrote", address, size, line);
    }
    tensor->writers[i] = thread_number + 1;
    tensor->has_value[i] = true;
  }
  std::memcpy(reinterpret_cast<void*>(address), from, size);
}

extern "C" {

// What tests call: forget the tensors, declare one, and say how kernels run.
void clear_tensors() { tensors.clear(); }
void add_tensor(const void* begin, uint64_t size, bool is_written) {
  tensors.emplace_back(reinterpret_cast<uint64_t>(begin), size, is_written);
}
void set_rounding(int seed, bool threads_descend) { rounding = seed, descending = threads_descend; }
// So many blocks at the end of each grid run, and outputs need not be written; 0 for all.
void set_last_blocks(uint32_t count) { last_blocks = count; }
// How many launches there were, by kernel and in all.
int64_t count_launches() {
  int64_t count = 0;
  for (const auto& [name, number] : launches) {
    count += number;
  }
  return count;
}
// The device of the last launch.
int get_launch_device() { return launch_device; }
int64_t count_unwritten(int tensor) {
  const Tensor& written = tensors[static_cast<size_t>(tensor)];
  int64_t count = 0;
  for (uint64_t i = 0; last_blocks == 0 && i < written.size; ++i) {
    count += !written.has_value[i];
  }
  return count;
}
// The faults since the last call.
const char* take_faults() {
  static std::string taken;
  taken = faults;
  faults.clear();
  return taken.c_str();
}
const char* get_last_kernel() { return last_kernel.c_str(); }
int count_kernels() { return static_cast<int>(kernels.size()); }
int count_launched() { return static_cast<int>(launches.size()); }

// The functions of the CUDA runtime that compiled launch code calls.
struct Dim3 {
  unsigned x, y, z;
};
struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<Configuration> configurations;
static std::map<const void*, const Kernel*> functions;
static int last_error = 0;

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  for (const Kernel& kernel : kernels) {
    if (std::strcmp(kernel.name, name) == 0) {
      functions[host] = &kernel;
    }
  }
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  const Configuration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid, *block = top.block, *shared = top.shared, *stream = top.stream;
  return 0;
}
int __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<Kernel*>(functions.at(function));
  return 0;
}
int cudaSetDevice(int number) {
  device = number;
  return 0;
}
int cudaGetLastError() { return std::exchange(last_error, 0); }
const char* cudaGetErrorString(int error) { return error == 0 ? "no error" : "invalid launch"; }

int __cudaLaunchKernel(
    void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  current = static_cast<const Kernel*>(function);
  last_kernel = current->name;
  ++launches[last_kernel];
  launch_device = device;
  // The kernels have grids of one dimension and no shared memory.
  if (grid.x == 0 || grid.x > INT32_MAX || grid.y != 1 || grid.z != 1 || block.x == 0 ||
      block.x > 1024 || block.y != 1 || block.z != 1 || shared != 0) {
    report("invalid launch", 0, 0, 0);
    return last_error = 9;
  }
  std::vector<uint8_t> parameters(current->parameters_size);
  for (size_t i = 0; i < current->parameters.size(); ++i) {
    const Span& span = current->parameters[i];
    std::memcpy(parameters.data() + span.at, arguments[i], span.size);
  }
  for (Tensor& tensor : tensors) {
    tensor.writers.clear();
  }
  const uint32_t threads = grid.x * block.x;
  const bool few = last_blocks != 0 && last_blocks < grid.x;
  for (uint32_t i = few ? threads - last_blocks * block.x : 0; i < threads; ++i) {
    thread_number = descending && !few ? threads - 1 - i : i;
    Thread thread{
        thread_number % block.x, thread_number / block.x, block.x, parameters.data(),
        current->parameters_size};
    current->run(thread);
  }
  return 0;
}

}  // extern "C"
