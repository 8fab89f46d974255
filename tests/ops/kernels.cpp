// Runs the CPU kernels without torch, for an instruction set that this machine only emulates.
// Usage: kernels CASES RESULTS. A case is 23 numbers of 64 bits, alpha as the last, then the input
// and grad_output; its result is the output and grad_input.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/soft_pool.h"

using namespace mmsoftpool;
using namespace mmsoftpool::cpu;

namespace {

constexpr int count = 23;

template <typename T>
void run(const Pooling& pooling, FILE* cases, FILE* results) {
  const auto in = pooling.planes() * pooling.in_plane();
  const auto out = pooling.planes() * pooling.out_plane();
  // On the heap and of the exact size, so that an access outside is one that a checker sees.
  std::vector<T> input(in), grad_output(out), output(out), grad_input(in);
  if (std::fread(input.data(), sizeof(T), in, cases) != size_t(in) ||
      std::fread(grad_output.data(), sizeof(T), out, cases) != size_t(out)) {
    std::abort();
  }
  const int64_t block = channel_block(pooling, 1);
  // Items one by one: their results do not depend on the range that they are in.
  for (int64_t i = 0; i < forward_items(pooling); ++i) {
    pool_forward(pooling, input.data(), output.data(), i, i + 1);
  }
  pool_backward(
      pooling, block, grad_output.data(), input.data(), grad_input.data(), 0,
      backward_items(pooling, block));
  std::fwrite(output.data(), sizeof(T), out, results);
  std::fwrite(grad_input.data(), sizeof(T), in, results);
}

}  // namespace

int main(int, char** argv) {
  FILE* const cases = std::fopen(argv[1], "rb");
  FILE* const results = std::fopen(argv[2], "wb");
  for (int64_t numbers[count]; std::fread(numbers, sizeof(int64_t), count, cases) == count;) {
    Pooling pooling;
    pooling.layout = numbers[1] ? Layout::channels_last : Layout::contiguous;
    pooling.batch = numbers[2];
    pooling.channels = numbers[3];
    const int64_t* number = numbers + 4;
    for (Axis* axis : {&pooling.depth, &pooling.height, &pooling.width}) {
      *axis = Axis{number[0], number[1], number[2], number[3], number[4], number[5]};
      number += 6;
    }
    std::memcpy(&pooling.alpha, number, sizeof(double));
    // The lowest bit of the data type's number says which gradient.
    pooling.gradient = numbers[0] % 2 ? Gradient::paper : Gradient::exact;
    switch (numbers[0] / 2) {
      case 0:
        run<float>(pooling, cases, results);
        break;
      case 1:
        run<double>(pooling, cases, results);
        break;
      case 2:
        run<Half>(pooling, cases, results);
        break;
      default:
        run<BFloat16>(pooling, cases, results);
    }
  }
  std::fclose(cases);
  return std::fclose(results);
}
