// Runs one kernel of CubeCL's CUDA C++ on a CPU, a workgroup at a time, to test what a device
// without tensor cores cannot: where fragments lie, what ldmatrix addresses, and that nothing is
// read before it has arrived or overwritten before it is read.
//
// Each unit is a fiber. Instructions of a whole warp wait for all of its lanes, and the layouts are
// those of the PTX manual (mma.m16n8k16, ldmatrix). Asynchronous copies happen at once or, if
// EMULATE_LATE is set, at the last moment that the barrier allows. This is no simulator: it knows
// just what these kernels use.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(units)
#define __align__(bytes) __attribute__((aligned(bytes)))

namespace emulated {
[[noreturn]] inline void fail(const char *what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::exit(1);
}

struct Position { unsigned x, y, z; };
struct Fiber { ucontext_t context; std::vector<char> stack; bool done; Position thread; };
struct Meeting { int size = 0, arrived = 0; unsigned round = 0; };
struct Copy { const void *from; void *to; int bytes; };
struct Lane { uint32_t a[4], b[2]; const void *row; int kind; };

inline std::vector<Fiber> fibers;
inline int current, left;
inline ucontext_t home;
inline Position block, blocks, units;
inline Meeting everyone, arrivals;
inline std::vector<Meeting> warps;
inline std::vector<Lane> lanes;
inline std::vector<Copy> copies;
inline std::vector<char> unannounced;
inline bool late;

inline void yield() {
  int from = current, to = from;
  do { to = (to + 1) % (int)fibers.size(); } while (fibers[to].done && to != from);
  if (to == from) return;
  current = to;
  swapcontext(&fibers[from].context, &fibers[to].context);
}

template <class Last> void meet(Meeting &meeting, Last last) {
  unsigned round = meeting.round;
  if (++meeting.arrived == meeting.size) {
    last();
    meeting.arrived = 0;
    meeting.round++;
    return;
  }
  for (long tries = 0; meeting.round == round; tries++) {
    if (tries > 200000) fail("some units wait for others that do not come");
    yield();
  }
}

// Every lane's operands, once all have given them; call `release` when they are read.
inline Lane *gather(const Lane &mine) {
  int warp = current / 32;
  lanes[current] = mine;
  Lane *all = &lanes[warp * 32];
  meet(warps[warp], [&] {
    for (int lane = 1; lane < 32; lane++)
      if (all[lane].kind != all[0].kind) fail("lanes of a warp are at different instructions");
  });
  return all;
}
inline void release() { meet(warps[current / 32], [] {}); }

inline void copy(const Copy &copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset((char *)copy.to + copy.bytes, 0, 16 - copy.bytes);
}

inline float half(uint32_t pair, int side) {
  uint32_t bits = side ? pair & 0xffff0000u : pair << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void load(uint32_t *out[4], const void *row, bool transposed) {
  if ((uintptr_t)row % 16) fail("ldmatrix of a row that is not aligned");
  Lane *all = gather({{}, {}, row, transposed ? 1 : 2});
  int lane = current % 32;
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t value[2];
    for (int side = 0; side < 2; side++) {
      int r = transposed ? lane % 4 * 2 + side : lane / 4;
      int c = transposed ? lane / 4 : lane % 4 * 2 + side;
      value[side] = ((const uint16_t *)all[matrix * 8 + r].row)[c];
    }
    *out[matrix] = value[0] | (uint32_t)value[1] << 16;
  }
  release();
}
} // namespace emulated

#define threadIdx emulated::fibers[emulated::current].thread
#define blockIdx emulated::block
#define blockDim emulated::units
#define gridDim emulated::blocks

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  operator float() const { return emulated::half(bits, 0); }
};

inline void __syncthreads() { emulated::meet(emulated::everyone, [] {}); }
inline int __clz(int value) { return value ? __builtin_clz((unsigned)value) : 32; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

namespace cuda {
enum thread_scope { thread_scope_block };
template <thread_scope> struct barrier {
  using arrival_token = int;
  void arrive_and_wait() {
    emulated::meet(emulated::arrivals, [] {
      for (char unit : emulated::unannounced)
        if (unit) emulated::fail("a copy that no barrier waits for");
      for (auto &copy : emulated::copies) emulated::copy(copy);
      emulated::copies.clear();
    });
  }
};
template <thread_scope S> void init(barrier<S> *, unsigned count) {
  if ((int)count != emulated::arrivals.size) emulated::fail("not every unit arrives at the barrier");
}
} // namespace cuda
namespace cooperative_groups {
struct thread_block {};
inline thread_block this_thread_block() { return {}; }
} // namespace cooperative_groups

template <class B> void __cp_async_arrive(B &) { emulated::unannounced[emulated::current] = 0; }
template <int Size> void __cp_async_shared_global(const void *from, void *to, int bytes) {
  static_assert(Size == 16);
  if ((uintptr_t)from % 16 || (uintptr_t)to % 16) emulated::fail("a copy that is not aligned");
  emulated::unannounced[emulated::current] = 1;
  if (emulated::late) emulated::copies.push_back({from, to, bytes});
  else emulated::copy({from, to, bytes});
}

inline void __ldmatrix_m8n8___nv_bfloat16_4x(uint32_t &a, uint32_t &b, uint32_t &c, uint32_t &d, const void *row) {
  uint32_t *out[4] = {&a, &b, &c, &d};
  emulated::load(out, row, false);
}
inline void __ldmatrix_m8n8___nv_bfloat16_4x_trans(uint32_t &a, uint32_t &b, uint32_t &c, uint32_t &d, const void *row) {
  uint32_t *out[4] = {&a, &b, &c, &d};
  emulated::load(out, row, true);
}
inline void __mma_m16n8k16___nv_bfloat16___nv_bfloat16_float(
    uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
    float c0, float c1, float c2, float c3, float &d0, float &d1, float &d2, float &d3) {
  emulated::Lane *all = emulated::gather({{a0, a1, a2, a3}, {b0, b1}, nullptr, 3});
  float sums[4] = {c0, c1, c2, c3};
  int lane = emulated::current % 32;
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      // The lane and the register that hold A's (row, k) and B's (k, column).
      const auto &left = all[row % 8 * 4 + k % 8 / 2];
      const auto &right = all[column * 4 + k % 8 / 2];
      sums[i] += emulated::half(left.a[k / 8 * 2 + row / 8], k % 2) *
                 emulated::half(right.b[k / 8], k % 2);
    }
  }
  emulated::release();
  d0 = sums[0]; d1 = sums[1]; d2 = sums[2]; d3 = sums[3];
}

uint8_t dynamic_shared_mem[232448] __attribute__((aligned(128)));

namespace emulated {
inline void (*body)();
inline void start() {
  body();
  fibers[current].done = true;
  if (--left == 0) setcontext(&home);
  yield();
  fail("a finished unit goes on");
}

inline void run(unsigned x, unsigned y, unsigned count, void (*what)()) {
  body = what;
  blocks = {x, y, 1};
  units = {count, 1, 1};
  late = std::getenv("EMULATE_LATE") != nullptr;
  fibers.resize(count);
  for (auto &fiber : fibers) fiber.stack.resize(1 << 20);
  everyone.size = arrivals.size = (int)count;
  warps.assign(count / 32, {});
  for (auto &warp : warps) warp.size = 32;
  lanes.resize(count);
  unannounced.assign(count, 0);
  for (block = {0, 0, 0}; block.y < y; block.y++) {
    for (block.x = 0; block.x < x; block.x++) {
      std::memset(dynamic_shared_mem, 0xff, sizeof dynamic_shared_mem); // every value is NaN
      left = (int)count;
      for (unsigned unit = 0; unit < count; unit++) {
        auto &fiber = fibers[unit];
        fiber.done = false;
        fiber.thread = {unit, 0, 0};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start, 0);
      }
      current = 0;
      swapcontext(&home, &fibers[0].context);
      for (char unit : unannounced) if (unit) fail("a copy that no barrier waits for");
    }
  }
}

// A launch as the test writes it, in words of 32 bits: workgroups along x and y, units, two float
// scalars, six integer scalars, the number of buffers and, of each, its element's bytes, its rank (0
// for an array), its extents, its length and its bytes, padded to a word.
struct Launch {
  std::vector<uint32_t> words;
  std::vector<std::vector<uint32_t>> buffers;
  std::vector<uint32_t> fixed, dynamic;
  uint32_t x, y, count, scalars[8];

  explicit Launch(const char *path) {
    std::ifstream file(path, std::ios::binary);
    uint32_t word;
    while (file.read((char *)&word, 4)) words.push_back(word);
    size_t at = 0;
    x = words[at++]; y = words[at++]; count = words[at++];
    for (auto &scalar : scalars) scalar = words[at++];
    uint32_t all = words[at++];
    std::vector<uint32_t> lengths, ranks, shapes, strides;
    for (uint32_t i = 0; i < all; i++) {
      uint32_t bytes = words[at++], rank = words[at++];
      std::vector<uint32_t> extents(words.begin() + at, words.begin() + at + rank);
      at += rank;
      uint32_t length = words[at++], size = (length * bytes + 3) / 4;
      buffers.emplace_back(words.begin() + at, words.begin() + at + size);
      buffers.back().resize(size + 4);
      at += size;
      lengths.push_back(length);
      if (rank == 0) continue;
      ranks.push_back(rank);
      shapes.push_back(dynamic.size());
      dynamic.insert(dynamic.end(), extents.begin(), extents.end());
      strides.push_back(dynamic.size());
      dynamic.push_back(rank == 2 ? extents[1] : 1);
      if (rank == 2) dynamic.push_back(1);
    }
    for (auto *part : {&lengths, &lengths, &ranks, &shapes, &strides})
      fixed.insert(fixed.end(), part->begin(), part->end());
  }
  void save(const char *path) {
    std::ofstream file(path, std::ios::binary);
    for (auto &buffer : buffers) file.write((char *)buffer.data(), (buffer.size() - 4) * 4);
  }
};
inline Launch *launch;

// The scalars and the metadata of fixed size, as the kernel takes them.
template <class Info> Info info() {
  Info info;
  std::memcpy(info.scalars_float, launch->scalars, 8);
  std::memcpy(info.scalars_uint32, launch->scalars + 2, 24);
  if (sizeof info.static_meta < launch->fixed.size() * 4) fail("metadata does not fit");
  std::memcpy(info.static_meta, launch->fixed.data(), launch->fixed.size() * 4);
  return info;
}
} // namespace emulated

// What follows the kernel: a main that reads a launch, runs it and writes all buffers.
#define EMULATE(KERNEL, ...)                                                              \
  static void body() {                                                                    \
    auto b = [](int i) { return emulated::launch->buffers[i].data(); };                   \
    const uint32_t *m = emulated::launch->dynamic.data();                                 \
    auto info = emulated::info<info_st>();                                                \
    (void)b;                                                                              \
    KERNEL(__VA_ARGS__, m, info);                                                         \
  }                                                                                       \
  int main(int, char **arguments) {                                                       \
    static emulated::Launch launch(arguments[1]);                                         \
    emulated::launch = &launch;                                                           \
    emulated::run(launch.x, launch.y, launch.count, body);                                \
    launch.save(arguments[2]);                                                            \
  }
