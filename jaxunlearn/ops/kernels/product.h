// Products of matrices in tiles that stay in registers, of numbers that lie in a thread's scratch.
//
// Scratch is made of words of 32 bits: a float, or two bfloat16 side by side along the axis that is summed over, where
// the processor multiplies such pairs. Sums are float.

#pragma once

#include "elements.h"

namespace {

// Accumulators that fit into the registers beside what they are fed with.
#ifdef __AVX512F__
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif

// What a number of an array is in scratch.
#ifdef __AVX512BF16__
template <class E>
using Stored = E;
#else
template <class E>
using Stored = float;
#endif
template <class S>
constexpr int kPair = sizeof(float) / sizeof(S);  // numbers in a word

inline int Words(int numbers, int pair) { return (numbers + pair - 1) / pair; }
inline int Whole(int columns) { return (columns + kLanes - 1) / kLanes * kLanes; }  // up to whole vectors

// Words from one row of scratch to the next: an odd number of cache lines, so that a column of rows lies in all of the
// cache's sets.
inline size_t RowOf(int words) { return (size_t)((words + 15) / 16 | 1) * 16; }

// Rows of scratch from vectors values(column, count)(row): `count` numbers, zeros behind them. Pairs are of neighbours
// in a row (`along`) and of neighbours in a column (`down`): whichever is not null.
template <class S, class Values>
inline void Fill(int rows, int columns, float* along, float* down, Values values) {
  constexpr int kRows = 4;  // that what is alike for all rows is loaded for
  size_t along_row = RowOf(Words(columns, kPair<S>)), down_row = RowOf(columns);
  for (int r = 0; r < rows; r += kRows) {
    int some = std::min(kRows, rows - r);
    auto vectors = [&](int c, int count) {
      auto value = values(c, count);
      Wide v[kRows] = {};
      if (some == kRows)
        for (int i = 0; i < kRows; i++) v[i] = value(r + i);
      else
        for (int i = 0; i < some; i++) v[i] = value(r + i);
      if constexpr (kPair<S> == 1) {
        float* to = (along ? along : down) + r * down_row + c;
        for (int i = 0; i < kRows; i++) Store(to + i * down_row, v[i]);
      } else {
        Half<Wide> half[kRows];
        for (int i = 0; i < kRows; i++) half[i] = Rounded(v[i]);
        if (along)
          for (int i = 0; i < kRows; i++) std::memcpy(along + (r + i) * along_row + c / 2, &half[i], sizeof(half[i]));
        if (down)
          for (int i = 0; i < kRows; i += 2) {
            Bits<Wide> low = __builtin_convertvector(half[i], Bits<Wide>);
            Bits<Wide> high = __builtin_convertvector(half[i + 1], Bits<Wide>);
            Store(down + (r + i) / 2 * down_row + c, (Wide)(low | high << 16));
          }
      }
    };
    int c = 0;
    for (; c + kLanes <= columns; c += kLanes) vectors(c, kLanes);
    if (c < columns) vectors(c, columns - c);
  }
}

// Memory that is fetched while something else is multiplied, a line at a step: of many at once most would be dropped.
class Ahead {
  const char *at[3], *end[3];
  int ranges = 0, now = 0;

 public:
  size_t step = 0;  // bytes

  template <class E>
  void Add(const E* from, size_t count) {
    at[ranges] = (const char*)from;
    end[ranges++] = (const char*)(from + count);
  }
  void Divide(size_t steps) {
    size_t bytes = 0;
    for (int i = 0; i < ranges; i++) bytes += end[i] - at[i];
    step = std::min<size_t>(bytes / steps + 1, 64);
  }
  // Where the next `steps` begin.
  const char* Take(int steps) {
    if (now < ranges && at[now] >= end[now]) now++;
    if (now == ranges) return nullptr;
    const char* from = at[now];
    at[now] += step * steps;
    return from;
  }
};

template <class S>
inline Wide MultiplyAdd(float word, Wide words, Wide sum) {
#ifdef __AVX512BF16__
  if constexpr (kPair<S> == 2)
    return (Wide)_mm512_dpbf16_ps((__m512)sum, (__m512bh)words, (__m512bh)_mm512_set1_ps(word));
#endif
  return sum + word * words;
}

// sum[m][n] += over k < depth: a[m * down + k * along] * (vector n of b + k * row).
template <class S, int M, int N>
inline void AddTile(int depth, const float* a, size_t down, size_t along, const float* b, size_t row,
                    Wide (&sum)[M][N], Ahead& ahead) {
  const char* fetch = ahead.Take(depth);
  size_t step = ahead.step;
  for (int k = 0; k < depth; k++, a += along, b += row, fetch += step) {
    __builtin_prefetch(fetch, 0, 2);
    Wide v[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; n++) v[n] = Load<Wide>(b + n * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      float word = a[m * down];
#pragma GCC unroll 3
      for (int n = 0; n < N; n++) sum[m][n] = MultiplyAdd<S>(word, v[n], sum[m][n]);
    }
  }
}

// block<N>(first column) for blocks of N vectors that cover all columns.
template <class Block>
inline void ForColumns(int columns, Block block) {
  int vectors = Whole(columns) / kLanes, v = 0;
  if (vectors == 1) return block.template operator()<1>(0);
  if (vectors % 2) block.template operator()<3>(0), v = 3;
  for (; v < vectors; v += 2) block.template operator()<2>(v * kLanes);
}

// block<M>(first row) for blocks of M rows that cover all, for tiles of N vectors.
template <int N, class Block>
inline void ForRows(int rows, Block block) {
  constexpr int kMost = kAccumulators / std::max(N, 2), kLess = kMost * 2 / 3;
  int r = 0;
  for (; rows - r >= kMost && rows - r != 2 * kLess; r += kMost) block.template operator()<kMost>(r);
  for (; rows - r >= kLess; r += kLess) block.template operator()<kLess>(r);
  for (; rows - r >= 2; r += 2) block.template operator()<2>(r);
  for (; r < rows; r++) block.template operator()<1>(r);
}

// About how many tiles a product of so many rows and columns has.
inline int Tiles(int rows, int columns) {
  constexpr int kRows = kAccumulators / 2, kColumns = 2 * kLanes;
  return (rows + kRows - 1) / kRows * ((columns + kColumns - 1) / kColumns);
}

// A matrix [depth, columns] of numbers at(k, column), in the order in which Product reads it: a plain row would be far
// from the next, and few of them fit into a cache's sets.
template <class S, class At>
std::vector<float> Pack(ffi::ThreadPool& pool, int depth, int columns, At at) {
  constexpr int kBlock = 16;
  int words = Words(depth, kPair<S>);
  std::vector<float> packed((size_t)words * Whole(columns));
  ForColumns(columns, [&]<int N>(int first) {
    float* panel = packed.data() + (size_t)first * words;
    int count = std::min(N * kLanes, columns - first);
    for (int k = 0; k < words; k += kBlock)
      for (int c = 0; c < count; c++)
        for (int i = k; i < std::min(words, k + kBlock); i++) {
          S numbers[kPair<S>] = {};
          for (int j = 0; j < kPair<S>; j++)
            if (i * kPair<S> + j < depth) numbers[j] = FromFloat<S>(at(i * kPair<S> + j, first + c));
          std::memcpy(panel + (size_t)i * N * kLanes + c, numbers, sizeof(float));
        }
  });
  return packed;
}

// Rows of scratch `a` [rows, words] times a packed matrix. finish(row, column, sums [M][N]) takes the tiles.
template <class S, class Finish>
inline void Product(int rows, int words, int columns, const float* a, const float* packed, Ahead& ahead,
                    Finish finish) {
  size_t row = RowOf(words);
  ForColumns(columns, [&]<int N>(int c) {
    ForRows<N>(rows, [&]<int M>(int r) {
      Wide sum[M][N] = {};
      AddTile<S, M, N>(words, a + r * row, row, 1, packed + (size_t)c * words, N * kLanes, sum, ahead);
      finish.template operator()<M, N>(r, c, sum);
    });
  });
}

// to [left, Whole(right)] += transposed scratch `a` [words, left] times scratch `b` [words, right].
template <class S>
inline void AddTransposedProduct(int words, int left, int right, const float* a, const float* b, float* to,
                                 Ahead& ahead) {
  size_t a_row = RowOf(left), b_row = RowOf(right), to_row = Whole(right);
  ForColumns(right, [&]<int N>(int c) {
    ForRows<N>(left, [&]<int M>(int r) {
      Wide sum[M][N] = {};
      AddTile<S, M, N>(words, a + r, 1, a_row, b + c, b_row, sum, ahead);
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
          float* at = to + (r + m) * to_row + c + n * kLanes;
          Store(at, Load<Wide>(at) + sum[m][n]);
        }
    });
  });
}

}  // namespace
