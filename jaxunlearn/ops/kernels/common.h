// What the kernels share of threads: the work of a call, memory, sums over images. Images are NHWC, kernels HWIO.
//
// Work is divided into the same parts whatever the number of threads, and sums of parts are added up in one order, so
// results are the same bits on every run.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

// Flushes denormals to zero in this thread while it lives, as XLA does in its own: which thread computes what must not
// matter.
struct FlushDenormals {
#ifdef __SSE__
  unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

struct Work {
  std::function<void(int)> item;
  int count;
  std::atomic<int> next{0}, done{0};

  void Run() {
    FlushDenormals flush;
    for (int i; (i = next.fetch_add(1)) < count; done.fetch_add(1)) item(i);
  }
};

// item(0) ... item(count - 1). The caller works too and waits only for items that a running thread has begun, so this
// cannot lock up when all threads of the pool are callers.
inline void ParallelFor(ffi::ThreadPool& pool, int count, std::function<void(int)> item) {
  auto work = std::make_shared<Work>();
  work->item = std::move(item);
  work->count = count;
  int helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int i = 0; i < helpers; i++) pool.Schedule([work] { work->Run(); });
  work->Run();
  while (work->done.load() < count) std::this_thread::yield();
}

// Memory of this thread, kept from call to call, from a line of the cache on; each `slot` is a piece of its own. What
// is in it is left from before.
template <class T = float>
T* Scratch(int slot, size_t size) {
  struct Piece {
    size_t bytes = 0;
    std::unique_ptr<void, void (*)(void*)> memory{nullptr, std::free};
  };
  thread_local Piece pieces[4];
  Piece& piece = pieces[slot];
  if (size_t bytes = (size * sizeof(T) + 63) / 64 * 64; piece.bytes < bytes) {
    piece.memory.reset(std::memset(std::aligned_alloc(64, bytes), 0, bytes));
    piece.bytes = bytes;
  }
  return (T*)piece.memory.get();
}

constexpr int kGroups = 16;  // of images: each adds up a gradient of its own

// part(group, gradient) for every group; `gradient`, of `size` floats, zero at first. Their sum goes to `out`. Zeroed
// and summed by all threads: 64 to 64 channels of 8x8 in bfloat16, backward, 1.27 ms; by one thread 1.41.
inline void SumOfGroups(ffi::ThreadPool& pool, size_t size, float* out, std::function<void(int, float*)> part) {
  std::unique_ptr<float[]> gradients(new float[kGroups * size]);
  float* all = gradients.get();
  ParallelFor(pool, kGroups, [=](int group) {
    std::fill_n(all + group * size, size, 0.f);
    part(group, all + group * size);
  });
  size_t slice = std::max<size_t>(1 << 12, (size + kGroups - 1) / kGroups);
  ParallelFor(pool, (size + slice - 1) / slice, [=](int i) {
    size_t begin = i * slice, end = std::min(size, begin + slice);
    std::fill(out + begin, out + end, 0.f);
    for (int group = 0; group < kGroups; group++)
      for (size_t i = begin; i < end; i++) out[i] += all[group * size + i];
  });
}

// Behind a lambda's parameters: all that it calls is made part of it. Left to itself GCC stops somewhere in the middle
// of a tile, other tiles with every change: 160 to 960 channels of 4x4, 1x1, backward 3.6 ms so, 4.1 to 5.0 otherwise.
#define FLAT __attribute__((flatten))

// Before a function: compiled once, with all that it calls, not as a part of every place that calls it. Without this
// convolution_bf16.cc took 49 s and 1.5 GB for a processor with AVX2, and 16 s and .7 GB with it.
#define ONCE __attribute__((noinline, flatten))

#define THREADED ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
