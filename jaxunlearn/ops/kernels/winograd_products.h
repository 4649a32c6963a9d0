// The products of matrices in Winograd's convolution (winograd.cc), and the memory that they work in.

#pragma once

#include <mutex>

#include "images.h"

namespace winograd {

// Rows of tiles of two vectors that fit into the registers: of a product, and of one whose first factor is transposed
// (its rows are channels, multiples of 16).
#ifdef __AVX512F__
constexpr int kRows = 12, kTransposedRows = 8;
#else
constexpr int kRows = 6, kTransposedRows = 4;
#endif
constexpr int kPanel = 2 * kLanes;  // features that a product makes at a time

// Floats for all threads of a call, whatever they are at first. Kept from call to call: the allocator may hand memory
// back to the system when a call ends, and then the first touch of each page costs more than what is done with it.
class Memory {
 public:
  explicit Memory(size_t size) {
    std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      memory_ = std::move(free_.back());
      free_.pop_back();
    }
    if (memory_.size() < size + 16) memory_ = std::vector<float>(size + 16);
  }
  ~Memory() {
    std::lock_guard lock(mutex_);
    free_.push_back(std::move(memory_));
  }
  // From a line of the cache on: vectors across two cost double.
  float* data() { return (float*)(((uintptr_t)memory_.data() + 63) & ~(uintptr_t)63); }

 private:
  static inline std::mutex mutex_;
  static inline std::vector<std::vector<float>> free_;
  std::vector<float> memory_;
};

// What a chunk's tiles become: for each position a matrix [tiles, channels]. Rows and positions are apart by no power
// of two, which would put them into the same few lines of the cache.
struct Layout {
  int channels;
  size_t row, position, chunk;

  Layout(int tiles, int channels, int positions)
      : channels(channels), row(channels % 128 ? channels : channels + 16), position((size_t)tiles * row + 16),
        chunk(positions * position) {}
};

// Memory that is needed next, called into the cache a few lines at a time while products are computed, which leave the
// way to memory idle: 64 channels of 32x32, forward and backward, 13.1 and 26.1 ms without, 12.1 and 23.1 with.
class Ahead {
 public:
  // For the products [tiles, ...] x [..., width] of all positions.
  Ahead(int positions, int tiles, int width)
      : steps_(positions * ((tiles + kRows - 1) / kRows) * ((width + kPanel - 1) / kPanel)) {}

  void Read(const float* from, size_t count) { Add(from, count, false); }
  void Write(const float* to, size_t count) { Add(to, count, true); }
  void Step() {
    for (Range& range : ranges_) {
      const float* until = std::min(range.end, range.at + range.step);
      for (; range.at < until; range.at += 16) {
        if (range.write) __builtin_prefetch(range.at, 1, 2);
        else __builtin_prefetch(range.at, 0, 2);
      }
    }
  }

 private:
  struct Range {
    const float *at, *end;
    size_t step;
    bool write;
  };
  void Add(const float* from, size_t count, bool write) {
    ranges_[count_++] = {from, from + count, (count / 16 / steps_ + 1) * 16, write};
  }
  int steps_, count_ = 0;
  Range ranges_[4] = {};
};

// R rows of a matrix times a panel of N vectors. Lines from `next` on are called into the cache: panels of wide layers
// come from too far for the CPU to fetch them in time by itself (512 channels: 6%).
template <int R, int N>
inline void Product(const float* a, size_t a_row, int depth, const float* panel, const float* next, float* out,
                    size_t out_row) {
  Wide sum[R][N] = {};
  for (int k = 0; k < depth; k++, panel += N * kLanes) {
    __builtin_prefetch(next + k * 16, 0, 2);
    Wide b[N];
    for (int n = 0; n < N; n++) b[n] = Load<Wide>(panel + n * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      float value = a[r * a_row + k];
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) sum[r][n] += value * b[n];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) Store(out + r * out_row + n * kLanes, sum[r][n]);
}

// [rows, depth] times columns begin ... begin + count of a transformed kernel.
void Products(int rows, const float* a, size_t a_row, int depth, const float* kernel, int begin, int count, float* out,
              size_t out_row, Ahead& ahead) {
  auto panel = [&]<int N>(int f) {
    const float* from = kernel + (size_t)(begin + f) * depth;
    const float* next = from + depth * N * kLanes;
    int r = 0;
    auto tiles = [&]<int R>() {
      for (; r + R <= rows; r += R) {
        ahead.Step();
        Product<R, N>(a + r * a_row, a_row, depth, from, next, out + r * out_row + f, out_row);
        next += depth * 16;
      }
    };
    tiles.template operator()<kRows>();
    tiles.template operator()<4>();
    tiles.template operator()<1>();
  };
  int f = 0;
  for (; f + kPanel <= count; f += kPanel) panel.template operator()<2>(f);
  if (f < count) panel.template operator()<1>(f);
}

// M rows of a transposed matrix times N vectors of another, added to `sums`, or put there at first. The sums below them
// are called into the cache (512 channels: 4%).
template <int M, int N>
inline void AddProduct(int rows, int chunk, const float* a, const Layout& left, const float* b, const Layout& right,
                       bool first, float* sums, size_t row) {
  Wide sum[M][N] = {};
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) __builtin_prefetch(sums + (M + m) * row + n * 16, 1, 3);
  if (!first)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) sum[m][n] = Load<Wide>(sums + m * row + n * kLanes);
  for (; rows > 0; rows -= chunk, a += left.chunk, b += right.chunk) {
    const float *from = a, *with = b;
    for (int r = std::min(rows, chunk); r > 0; r--, from += left.row, with += right.row) {
      Wide v[N];
      for (int n = 0; n < N; n++) v[n] = Load<Wide>(with + n * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        float value = from[m];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) sum[m][n] += value * v[n];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) Store(sums + m * row + n * kLanes, sum[m][n]);
}

// [rows, channels]^T times [rows, features], of chunks that lie one after the other.
void AddProducts(int rows, int chunk, const float* a, const Layout& channels, const float* b, const Layout& features,
                 bool first, float* sums) {
  int width = features.channels;
  auto panel = [&]<int N>(int f) {
    for (int c = 0; c < channels.channels; c += kTransposedRows)
      AddProduct<kTransposedRows, N>(rows, chunk, a + c, channels, b + f, features, first,
                                     sums + (size_t)c * width + f, width);
  };
  int f = 0;
  for (; f + kPanel <= width; f += kPanel) panel.template operator()<2>(f);
  if (f < width) panel.template operator()<1>(f);
}

}  // namespace winograd
