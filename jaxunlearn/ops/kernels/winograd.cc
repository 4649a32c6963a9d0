// 3x3 convolution of stride 1 by Winograd's minimal filtering F(2x2, 3x3): 2.25 times fewer multiplications (Lavin &
// Gray, arXiv:1509.09308). A tile of 2x2 pixels of the output is A^T [(G k G^T) * (B^T d B)] A, with d the 4x4 pixels
// of the input around it; with channels the product in the middle is one of matrices [tiles, channels] x [channels,
// features] for each of sixteen positions. Chunks of tiles stay in a core's cache from transform to transform.
//
// Both gradients see the same transform of the output's gradient g: the kernel's is the correlation of g's 4x4 pixels
// with the input's 2x2, turned by half a circle. The input needs no margins for it.
//
// Channels and features must be multiples of 16.

#include <array>
#include <bit>
#include <cmath>
#include <mutex>

#include "elements.h"

namespace {

// The widest vector, and the rows of tiles of two such vectors that fit into the registers: of a product, and of one
// whose first factor is transposed (its rows are channels, multiples of 16).
#ifdef __AVX512F__
using Wide = Vec16;
constexpr int kRows = 12, kTransposedRows = 8;
#else
using Wide = Vec8;
constexpr int kRows = 6, kTransposedRows = 4;
#endif
constexpr int kLanes = sizeof(Wide) / sizeof(float);
constexpr int kPanel = 2 * kLanes;  // features that a product makes at a time

#ifndef TILES
#define TILES 48
#endif
#ifndef BLOCK
#define BLOCK 128
#endif
#ifndef WIDE
#define WIDE (128*128)
#endif
#ifndef KERNEL
#define KERNEL (1 << 30)
#endif
#ifndef SUPER
#define SUPER 128
#endif
constexpr int kTiles = TILES;
constexpr int kBlock = BLOCK;   // features from product to output transform
constexpr int kParts = 8;     // of the work, at least
constexpr int kRuns = 64;  // of chunks that follow each other

template <int P>
using Parts = std::array<Vec16, P>;

// Along one direction, P = 4: F(2, 3). P = 3: the same for an image of two pixels, where only two of four pixels under
// a tile are not padding: nine positions do instead of sixteen.

template <int P>
inline Parts<P> InputParts(Vec16 d0, Vec16 d1, Vec16 d2, Vec16 d3) {  // B^T
  if constexpr (P == 4) return {d0 - d2, d1 + d2, d2 - d1, d1 - d3};
  else return {d1, d1 + d2, d2};
}

template <int P>
inline Parts<P> KernelParts(Vec16 k0, Vec16 k1, Vec16 k2) {  // G
  if constexpr (P == 4) return {k0, (k0 + k2 + k1) * 0.5f, (k0 + k2 - k1) * 0.5f, k2};
  else return {k0 - k1, k1, k2 - k1};
}

template <int P>
inline Parts<2> OutputPixels(const Parts<P>& m) {  // A^T
  if constexpr (P == 4) return {m[0] + m[1] + m[2], m[1] - m[2] - m[3]};
  else return {m[1] + m[2], m[0] + m[1]};
}

template <int P>
inline Parts<P> PixelParts(Vec16 z0, Vec16 z1) {  // A
  if constexpr (P == 4) return {z0, z0 + z1, z0 - z1, -z1};
  else return {z1, z0 + z1, z0};
}

template <int P>
inline Parts<3> KernelGradient(const Parts<P>& u) {  // G^T
  if constexpr (P == 4) return {u[0] + (u[1] + u[2]) * 0.5f, (u[1] - u[2]) * 0.5f, (u[1] + u[2]) * 0.5f + u[3]};
  else return {u[0], u[1] - u[0] - u[2], u[2]};
}

// Floats, and not yet any in particular. Kept from call to call: the allocator may hand memory back to the system when a
// call ends, and then each page's first touch costs more than what is done with it.
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
  float* data() { return Aligned(memory_.data()); }

  // This thread's.
  static float* Scratch(size_t size) {
    thread_local std::vector<float> memory;
    if (memory.size() < size + 16) memory = std::vector<float>(size + 16);
    return Aligned(memory.data());
  }

 private:
  // To a line of the cache: vectors across two cost double.
  static float* Aligned(float* memory) { return (float*)(((uintptr_t)memory + 63) & ~(uintptr_t)63); }
  static inline std::mutex mutex_;
  static inline std::vector<std::vector<float>> free_;
  std::vector<float> memory_;
};

// z of x: parameters that leave x as it is where nothing is to be done.
struct Reading {
  std::vector<float> none;
  const float *mean, *factor, *bias;
  float lowest;
  bool relu, any;

  Reading(int64_t reading, int channels, const Array& mean, const Array& factor, const Array& bias)
      : none(2 * channels), mean(mean.typed_data()), factor(factor.typed_data()), bias(bias.typed_data()),
        lowest(reading == 2 ? 0 : -INFINITY), relu(reading == 2), any(reading != 0) {
    if (any) return;
    std::fill_n(none.begin() + channels, channels, 1.f);
    this->mean = this->bias = none.data();
    this->factor = none.data() + channels;
  }
  Vec16 operator()(Vec16 x, int c) const {
    Vec16 z = (x - Load<Vec16>(mean + c)) * Load<Vec16>(factor + c) + Load<Vec16>(bias + c);
    return z < lowest ? lowest - Vec16{} : z;  // NaN stays NaN
  }
};

// Chunks are of whole rows of tiles, numbered through all images.
struct Tiling {
  int batch, height, width, down, along, chunk, chunks;

  explicit Tiling(const Array& x)
      : batch(x.dimensions()[0]), height(x.dimensions()[1]), width(x.dimensions()[2]), down((height + 1) / 2),
        along((width + 1) / 2) {
    int rows = batch * down;
    chunk = std::max(1, kTiles / along);
    unsigned few = (rows + chunk - 1) / chunk;  // to be shared out evenly
    if (few < 32) chunk = (rows + std::bit_floor(few) - 1) / std::bit_floor(few);
    chunks = (rows + chunk - 1) / chunk;
  }

  int begin(int chunk) const { return chunk * this->chunk; }
  int end(int chunk) const { return std::min(begin(chunk + 1), batch * down); }
  int tiles(int chunk) const { return tiles(chunk, chunk + 1); }
  int tiles(int from, int to) const { return (end(to - 1) - begin(from)) * along; }
  size_t pixel(int row) const { return ((size_t)(row / down) * height + row % down * 2) * width; }  // its first
  bool lower(int row) const { return row % down * 2 + 1 < height; }  // whether its tiles have two rows of pixels
  size_t first(int chunk) const { return pixel(begin(chunk)); }
  size_t pixels(int chunk) const {
    return end(chunk) < batch * down ? first(chunk + 1) - first(chunk) : (size_t)batch * height * width - first(chunk);
  }
  int products(int chunk, int width) const { return (tiles(chunk) + kRows - 1) / kRows * ((width + kPanel - 1) / kPanel); }
};

// What a chunk's tiles become: for each position a matrix [tiles, channels]. Rows and positions are apart by no power of
// two, which would put them into the same few lines of the cache.
struct Layout {
  int channels;
  size_t row, position, chunk;

  Layout(const Tiling& t, int channels, int positions)
      : channels(channels), row(channels % 128 ? channels : channels + 16),
        position((size_t)t.chunk * t.along * row + 16), chunk(positions * position) {}
};

// B^T d B of a chunk's tiles. fill(pixel, count, to) makes `count` pixels' channels.
template <int P, class F>
void TransformInput(const Tiling& t, const Layout& layout, int chunk, float* scratch, float* out, F fill) {
  int channels = layout.channels;
  size_t size = (size_t)(2 * t.along + 2) * channels;
  float* rows[4] = {scratch, scratch + size, scratch + 2 * size, scratch + 3 * size};
  auto read = [&](int row, int from) {
    for (int i = from; i < 4; i++) {
      int y = row % t.down * 2 - 1 + i;
      if (y < 0 || y >= t.height) {
        std::fill_n(rows[i], size, 0.f);
        continue;
      }
      size_t end = (size_t)(t.width + 1) * channels;
      std::fill_n(rows[i], channels, 0.f);
      fill(((size_t)(row / t.down) * t.height + y) * t.width, t.width, rows[i] + channels);
      std::fill_n(rows[i] + end, size - end, 0.f);
    }
  };
  for (int row = t.begin(chunk); row < t.end(chunk); row++, out += t.along * layout.row) {
    bool follows = row > t.begin(chunk) && row % t.down > 0;
    if (follows) {
      std::swap(rows[0], rows[2]);
      std::swap(rows[1], rows[3]);
    }
    read(row, follows ? 2 : 0);
    for (int c = 0; c < channels; c += 16) {
      auto column = [&](int x) {
        size_t at = (size_t)x * channels + c;
        return InputParts<P>(Load<Vec16>(rows[0] + at), Load<Vec16>(rows[1] + at), Load<Vec16>(rows[2] + at),
                             Load<Vec16>(rows[3] + at));
      };
      Parts<P> d0 = column(0), d1 = column(1);
      float* to = out + c;
      for (int x = 0; x < t.along; x++, to += layout.row) {
        Parts<P> d2 = column(2 * x + 2), d3 = column(2 * x + 3);
#pragma GCC unroll 4
        for (int i = 0; i < P; i++) {
          Parts<P> parts = InputParts<P>(d0[i], d1[i], d2[i], d3[i]);
#pragma GCC unroll 4
          for (int j = 0; j < P; j++) Store(to + (i * P + j) * layout.position, parts[j]);
        }
        d0 = d2;
        d1 = d3;
      }
    }
  }
}

// A z A^T of a chunk's tiles.
template <int P>
void TransformPixels(const Tiling& t, const Layout& layout, int chunk, const Reading& read, const float* x,
                     int channels, int first, float* out) {
  size_t below = (size_t)t.width * channels;
  for (int row = t.begin(chunk); row < t.end(chunk); row++) {
    const float* from = x + t.pixel(row) * channels + first;
    for (int p = 0; p < t.along; p++, from += 2 * channels, out += layout.row) {
      bool right = 2 * p + 1 < t.width, lower = t.lower(row);
      for (int c = 0; c < layout.channels; c += 16) {
        auto pixel = [&](size_t at) { return read(Load<Vec16>(from + at + c), first + c); };
        Vec16 none = {};
        Parts<P> left = PixelParts<P>(pixel(0), lower ? pixel(below) : none), other{};
        if (right) other = PixelParts<P>(pixel(channels), lower ? pixel(below + channels) : none);
#pragma GCC unroll 4
        for (int i = 0; i < P; i++) {
          Parts<P> parts = PixelParts<P>(left[i], other[i]);
#pragma GCC unroll 4
          for (int j = 0; j < P; j++) Store(out + (i * P + j) * layout.position + c, parts[j]);
        }
      }
    }
  }
}

// A^T m A of a chunk's tiles, of 16 features: put(pixel, output) for every pixel of the image.
template <int P, class F>
inline void TransformOutput(const Tiling& t, int chunk, const float* m, size_t m_row, size_t m_position, F put) {
  for (int row = t.begin(chunk); row < t.end(chunk); row++) {
    size_t pixel = t.pixel(row);
    bool lower = t.lower(row);
    for (int x = 0; x < t.width; x += 2, pixel += 2, m += m_row) {
      Parts<P> upper_parts, lower_parts;
#pragma GCC unroll 4
      for (int j = 0; j < P; j++) {
        Parts<P> column;
#pragma GCC unroll 4
        for (int i = 0; i < P; i++) column[i] = Load<Vec16>(m + (i * P + j) * m_position);
        Parts<2> pixels = OutputPixels<P>(column);
        upper_parts[j] = pixels[0];
        lower_parts[j] = pixels[1];
      }
      Parts<2> top = OutputPixels<P>(upper_parts), bottom = OutputPixels<P>(lower_parts);
      put(pixel, top[0]);
      if (x + 1 < t.width) put(pixel + 1, top[1]);
      if (!lower) continue;
      put(pixel + t.width, bottom[0]);
      if (x + 1 < t.width) put(pixel + t.width + 1, bottom[1]);
    }
  }
}

// A 16x16 matrix: swaps the blocks beside the diagonal, of 1, then 2, 4, 8.
inline void Transpose(Vec16* rows) {
  typedef int Lanes __attribute__((vector_size(64)));
#pragma GCC unroll 4
  for (int size = 1; size < 16; size *= 2) {
    Lanes upper, lower;
    for (int i = 0; i < 16; i++) {
      upper[i] = i & size ? 16 + i - size : i;
      lower[i] = i & size ? 16 + i : i + size;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      if (i & size) continue;
      Vec16 a = rows[i], b = rows[i + size];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + size] = __builtin_shuffle(a, b, lower);
    }
  }
}

// Where a position's transformed kernel begins, of a matrix [depth, width] in panels [width / kPanel][depth][kPanel].
inline size_t KernelPosition(int depth, int width) { return (size_t)depth * width + 16; }

// G k G^T, columns begin ... begin + width. `kTurned`: of the kernel turned by half a circle, channels and features
// exchanged.
template <int P, bool kTurned>
void TransformKernel(ffi::ThreadPool& pool, const float* kernel, int channels, int features, int begin, int width,
                     float* out) {
  int depth = kTurned ? features : channels;
  size_t position = KernelPosition(depth, width);
  ParallelFor(pool, (kTurned ? width : channels) / 16, [=](int block) {
    int c = block * 16 + (kTurned ? begin : 0), first = kTurned ? 0 : begin, last = kTurned ? features : begin + width;
    for (int f = first; f < last; f += 16) {
      Vec16 taps[9][16];
      for (int tap = 0; tap < 9; tap++) {
        Vec16* rows = taps[kTurned ? 8 - tap : tap];
        const float* from = kernel + ((size_t)tap * channels + c) * features + f;
        for (int r = 0; r < 16; r++, from += features) {
#ifdef PK
          __builtin_prefetch(from + PK, 0, 3);
#endif
          rows[r] = Load<Vec16>(from);
        }
        if (kTurned) Transpose(rows);
      }
      int d = kTurned ? f : c, w = (kTurned ? c : f) - begin;
      int panel = w / kPanel * kPanel, row = std::min(kPanel, width - panel);
      float* to = out + (size_t)panel * depth + d * row + w - panel;
      for (int r = 0; r < 16; r++, to += row) {
        Parts<P> columns[3];
        for (int j = 0; j < 3; j++) columns[j] = KernelParts<P>(taps[j][r], taps[3 + j][r], taps[6 + j][r]);
        for (int i = 0; i < P; i++) {
          Parts<P> parts = KernelParts<P>(columns[0][i], columns[1][i], columns[2][i]);
          for (int j = 0; j < P; j++) Store(to + (i * P + j) * position, parts[j]);
        }
      }
    }
  });
}

// R rows of a matrix times a panel of N vectors.
template <int R, int N>
inline void Product(const float* a, size_t a_row, int depth, const float* panel, const float* next, float* out,
                    size_t out_row) {
  Wide sum[R][N] = {};
  for (int k = 0; k < depth; k++, panel += N * kLanes) {
#ifndef NOPRE
    __builtin_prefetch(next + k * 16, 0, 2);
#endif
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

// Memory that is needed next, called into the cache a few lines at a time while products are computed, which leave the
// way to memory idle.
class Ahead {
 public:
  explicit Ahead(int steps) : steps_(std::max(1, steps)) {}

  void Read(const float* from, size_t count) { Add(from, count, false); }
  void Write(const float* to, size_t count) { Add(to, count, true); }
  void Step() {
    for (Range& range : ranges_) {
      const float* until = std::min(range.end, range.at + range.step);
      for (; range.at < until; range.at += 16) range.write ? __builtin_prefetch(range.at, 1, 2) : __builtin_prefetch(range.at, 0, 2);
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

// M rows of a transposed matrix times N vectors of another, added to `sums`, or put there at first.
template <int M, int N>
inline void AddProduct(int rows, int chunk, const float* a, const Layout& left, const float* b, const Layout& right, bool first,
                       float* sums, size_t row) {
  Wide sum[M][N] = {};
#ifndef NOPRE2
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) __builtin_prefetch(sums + (M + m) * row + n * 16, 1, 3);
#endif
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

// Columns of a transformed kernel that are made and used at a time, so that they stay in the cache that cores share.
inline int Columns(int positions, int depth, int width) {
  return std::min(width, std::max(1, KERNEL / (positions * depth * kPanel)) * kPanel);
}

// Into how many shares of columns a part of the work is divided where there are few parts, and how wide they are.
struct Shares {
  int count, width;

  Shares(int parts, int columns) {
    int panels = (columns + kPanel - 1) / kPanel, wanted = (kParts + parts - 1) / parts;
    width = (panels + wanted - 1) / wanted * kPanel;
    count = (columns + width - 1) / width;
  }
};

template <int P>
void Forward(ffi::ThreadPool& pool, const Tiling& t, const Reading& read, const float* x, const float* kernel,
             int channels, int features, float* y, float* ymean, float* yvar) {
  int columns = Columns(P * P, channels, features);
  Memory memory(P * P * KernelPosition(channels, columns));
  float* kernels = memory.data();
  std::vector<float> statistics((size_t)t.chunks * 2 * features);
  float* parts = statistics.data();
  Layout layout(t, channels, P * P);
  int block = std::min(kBlock, columns), runs = std::min(t.chunks, kRuns);
  size_t m_position = (size_t)t.chunk * t.along * block + 16;

  // Columns begin ... end of `width` from `first`, of a chunk.
  auto convolve = [&](int chunk, int first, int width, int begin, int end, bool follows) {
    float* rows = Memory::Scratch(4 * (2 * t.along + 2) * channels + layout.chunk + P * P * m_position);
    float *v = rows + 4 * (2 * t.along + 2) * channels, *m = v + layout.chunk;
    TransformInput<P>(t, layout, chunk, rows, v, [&](size_t pixel, int count, float* to) {
      const float* from = x + pixel * channels;
      for (int p = 0; p < count; p++, from += channels, to += channels)
        for (int c = 0; c < channels; c += 16) Store(to + c, read(Load<Vec16>(from + c), c));
    });
    Ahead ahead(P * P * t.products(chunk, end - begin));
    if (follows) ahead.Read(x + t.first(chunk + 1) * channels, t.pixels(chunk + 1) * channels);
    if (end - begin == features) ahead.Write(y + t.first(chunk) * features, t.pixels(chunk) * features);
    float count = t.pixels(chunk);
    for (int f = begin; f < end; f += block) {
      int now = std::min(block, end - f);
      for (int p = 0; p < P * P; p++)
        Products(t.tiles(chunk), v + p * layout.position, layout.row, channels,
                 kernels + p * KernelPosition(channels, width), f, now, m + p * m_position, block, ahead);
      for (int i = 0; i < now; i += 16) {
        float* to = y + first + f + i;
        Vec16 sum = {}, squares[2] = {};
        TransformOutput<P>(t, chunk, m + i, block, m_position, [&](size_t pixel, Vec16 value) {
          Store(to + pixel * features, value);
          sum += value;
        });
        Vec16 mean = sum / count;
        for (int row = t.begin(chunk); row < t.end(chunk); row++) {
          const float* from = to + t.pixel(row) * features;
          for (int p = 0; p < (t.lower(row) ? 2 : 1) * t.width; p++, from += features) {
            Vec16 apart = Load<Vec16>(from) - mean;
            squares[p & 1] += apart * apart;
          }
        }
        float* own = parts + (size_t)chunk * 2 * features + first + f + i;
        Store(own, mean);
        Store(own + features, squares[0] + squares[1]);
      }
    }
  };
  for (int first = 0; first < features; first += columns) {
    int width = std::min(columns, features - first);
    TransformKernel<P, false>(pool, kernel, channels, features, first, width, kernels);
    Shares shares(runs, width);
    ParallelFor(pool, runs * shares.count, [&](int part) {
      int run = part / shares.count, from = part % shares.count * shares.width;
      int begin = (int64_t)t.chunks * run / runs, end = (int64_t)t.chunks * (run + 1) / runs;
      for (int chunk = begin; chunk < end; chunk++)
        convolve(chunk, first, width, from, std::min(width, from + shares.width), chunk + 1 < end);
    });
  }
  double pixels = (double)t.batch * t.height * t.width;
  for (int f = 0; f < features; f++) {
    double sum = 0, squares = 0;
    for (int k = 0; k < t.chunks; k++) sum += t.pixels(k) * parts[(size_t)k * 2 * features + f];
    double centre = sum / pixels;
    for (int k = 0; k < t.chunks; k++) {
      double apart = parts[(size_t)k * 2 * features + f] - centre;
      squares += parts[(size_t)(2 * k + 1) * features + f] + t.pixels(k) * apart * apart;
    }
    ymean[f] = centre;
    yvar[f] = squares / pixels;
  }
}

// What a pixel of the output hands back: gy + gmean / N + gvar * 2 (y - ymean) / N.
struct Gradient {
  const float *y, *gy, *mean;
  std::vector<float> constant, along;

  Gradient(const Array& y, const Array& mean, const Array& gy, const Array& gmean, const Array& gvar)
      : y(y.typed_data()), gy(gy.typed_data()), mean(mean.typed_data()), constant(mean.element_count()),
        along(mean.element_count()) {
    size_t features = mean.element_count();
    float pixels = y.element_count() / features;
    for (size_t f = 0; f < features; f++) {
      constant[f] = gmean.typed_data()[f] / pixels;
      along[f] = 2 * gvar.typed_data()[f] / pixels;
    }
  }
  void operator()(size_t pixel, int count, float* to) const {
    int features = constant.size();
    for (size_t at = pixel * features, end = at + (size_t)count * features; at < end; at += features, to += features)
      for (int f = 0; f < features; f += 16)
        Store(to + f, Load<Vec16>(gy + at + f) + Load<Vec16>(&constant[f]) +
                          Load<Vec16>(&along[f]) * (Load<Vec16>(y + at + f) - Load<Vec16>(mean + f)));
  }
};

template <int P>
void Backward(ffi::ThreadPool& pool, const Tiling& t, const Reading& read, const float* x, const float* kernel,
              const Gradient& gradient, int channels, int features, float* gx, float* gfactor, float* gbias,
              float* gkernel) {
  int columns = Columns(P * P, features, channels), block = std::min(kBlock, columns);
  Memory kernel_memory(P * P * KernelPosition(features, columns));
  float* kernels = kernel_memory.data();
  Layout outputs(t, features, P * P);
  std::vector<float> sums_of_chunks((size_t)t.chunks * 2 * channels);
  float* parts = sums_of_chunks.data();
  size_t m_position = (size_t)t.chunk * t.along * block + 16;
  bool wide = (size_t)channels * features >= WIDE;
  int groups = wide ? 1 : std::min(kGroups, t.chunks);
  size_t position = (size_t)columns * features + 16;
  Memory sum_memory(groups * P * P * position);
  float* sums = sum_memory.data();

  for (int first = 0; first < channels; first += columns) {
    int width = std::min(columns, channels - first);
    TransformKernel<P, true>(pool, kernel, channels, features, first, width, kernels);
    Layout inputs(t, width, P * P);

    auto transform = [&](int chunk, float* v, float* z) {
      float* rows = Memory::Scratch(4 * (2 * t.along + 2) * features);
      TransformInput<P>(t, outputs, chunk, rows, v, gradient);
      TransformPixels<P>(t, inputs, chunk, read, x, channels, first, z);
    };
    auto input_gradient = [&](int chunk, const float* v, float* m, int begin, int end, Ahead& ahead) {
      if (end - begin == channels) ahead.Write(gx + t.first(chunk) * channels, t.pixels(chunk) * channels);
      for (int c = begin; c < end; c += block) {
        int now = std::min(block, end - c);
        for (int p = 0; p < P * P; p++)
          Products(t.tiles(chunk), v + p * outputs.position, outputs.row, features,
                   kernels + p * KernelPosition(features, width), c, now, m + p * m_position, block, ahead);
        for (int i = 0; i < now; i += 16) {
          int at = first + c + i;
          Vec16 mean = Load<Vec16>(read.mean + at), factor = Load<Vec16>(read.factor + at);
          Vec16 biases = {}, factors = {};
          TransformOutput<P>(t, chunk, m + i, block, m_position, [&](size_t pixel, Vec16 value) {
            Vec16 input = Load<Vec16>(x + pixel * channels + at);
            if (read.relu) value = read(input, at) > 0 ? value : Vec16{};
            Store(gx + pixel * channels + at, value * factor);
            biases += value;
            factors += value * (input - mean);
          });
          float* own = parts + (size_t)chunk * 2 * channels + at;
          Store(own, biases);
          Store(own + channels, factors);
        }
      }
    };

    if (!wide) {
      ParallelFor(pool, groups, [&](int group) {
        int begin = (int64_t)t.chunks * group / groups, end = (int64_t)t.chunks * (group + 1) / groups;
        size_t rows = 4 * (2 * t.along + 2) * features;
        float* v = Memory::Scratch(rows + inputs.chunk + outputs.chunk + P * P * m_position) + rows;
        float *z = v + outputs.chunk, *m = z + inputs.chunk;
        for (int chunk = begin; chunk < end; chunk++) {
          transform(chunk, v, z);
          Ahead ahead(P * P * t.products(chunk, width));
          if (chunk + 1 < end) {
            ahead.Read(x + t.first(chunk + 1) * channels, t.pixels(chunk + 1) * channels);
            ahead.Read(gradient.y + t.first(chunk + 1) * features, t.pixels(chunk + 1) * features);
            ahead.Read(gradient.gy + t.first(chunk + 1) * features, t.pixels(chunk + 1) * features);
          }
          input_gradient(chunk, v, m, 0, width, ahead);
          for (int p = 0; p < P * P; p++)
            AddProducts(t.tiles(chunk), t.tiles(chunk), z + p * inputs.position, inputs, v + p * outputs.position,
                        outputs, chunk == begin, sums + (group * P * P + p) * position);
        }
      });
    } else {
      int each = t.chunk * t.along, together = std::min(std::max(1, SUPER / each), t.chunks);
      Memory transformed(together * (inputs.chunk + outputs.chunk));
      float *v = transformed.data(), *z = v + together * outputs.chunk;
      for (int begin = 0; begin < t.chunks; begin += together) {
        int count = std::min(together, t.chunks - begin);
        Shares shares(count, width);
        ParallelFor(pool, count, [&](int i) { transform(begin + i, v + i * outputs.chunk, z + i * inputs.chunk); });
        ParallelFor(pool, count * shares.count + P * P, [&](int i) {
          if (i < count * shares.count) {
            int chunk = i / shares.count, from = i % shares.count * shares.width;
            int until = std::min(width, from + shares.width);
            Ahead ahead(P * P * t.products(begin + chunk, until - from));
            input_gradient(begin + chunk, v + chunk * outputs.chunk, Memory::Scratch(P * P * m_position), from, until,
                           ahead);
          } else {
            int p = i - count * shares.count;
            AddProducts(t.tiles(begin, begin + count), each, z + p * inputs.position, inputs,
                        v + p * outputs.position, outputs, begin == 0, sums + p * position);
          }
        });
      }
    }

    ParallelFor(pool, width, [=](int c) {
      for (int f = 0; f < features; f += 16) {
        size_t at = (size_t)c * features + f;
        Parts<P> parts[P];
        for (int i = 0; i < P; i++)
          for (int j = 0; j < P; j++) {
            Vec16 sum = {};
            for (int group = 0; group < groups; group++)
              sum += Load<Vec16>(sums + ((group * P + i) * P + j) * position + at);
            parts[j][i] = sum;
          }
        Parts<P> rows[3];
        for (int j = 0; j < P; j++) {
          Parts<3> taps = KernelGradient<P>(parts[j]);
          for (int i = 0; i < 3; i++) rows[i][j] = taps[i];
        }
        for (int i = 0; i < 3; i++) {
          Parts<3> taps = KernelGradient<P>(rows[i]);
          for (int j = 0; j < 3; j++)
            Store(gkernel + ((size_t)(8 - (3 * i + j)) * channels + first + c) * features + f, taps[j]);
        }
      }
    });
  }
  for (int c = 0; c < channels; c++) {
    double biases = 0, factors = 0;
    for (int k = 0; k < t.chunks && read.any; k++) {
      biases += parts[(size_t)k * 2 * channels + c];
      factors += parts[(size_t)(2 * k + 1) * channels + c];
    }
    gbias[c] = biases;
    gfactor[c] = factors;
  }
}

ffi::Error Unsupported(int64_t stride, const Array& kernel) {
  auto d = kernel.dimensions();
  if (stride == 1 && d[0] == 3 && d[1] == 3 && d[2] % 16 == 0 && d[3] % 16 == 0) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("winograd: 3x3, stride 1, channels and features multiples of 16");
}

ffi::Error DispatchForward(ffi::ThreadPool pool, int64_t stride, int64_t reading, Array x, Array mean, Array factor,
                           Array bias, Array kernel, Result y, Result ymean, Result yvar) {
  if (auto error = Unsupported(stride, kernel); error.failure()) return error;
  Tiling t(x);
  int channels = kernel.dimensions()[2], features = kernel.dimensions()[3];
  Reading read(reading, channels, mean, factor, bias);
  auto run = t.down == 1 && t.along == 1 ? Forward<3> : Forward<4>;
  run(pool, t, read, x.typed_data(), kernel.typed_data(), channels, features, y->typed_data(), ymean->typed_data(),
      yvar->typed_data());
  return ffi::Error::Success();
}

ffi::Error DispatchBackward(ffi::ThreadPool pool, int64_t stride, int64_t reading, Array x, Array mean, Array factor,
                            Array bias, Array kernel, Array y, Array ymean, Array gy, Array gmean, Array gvar,
                            Result gx, Result gfactor, Result gbias, Result gkernel) {
  if (auto error = Unsupported(stride, kernel); error.failure()) return error;
  Tiling t(x);
  int channels = kernel.dimensions()[2], features = kernel.dimensions()[3];
  Reading read(reading, channels, mean, factor, bias);
  Gradient gradient(y, ymean, gy, gmean, gvar);
  auto run = t.down == 1 && t.along == 1 ? Backward<3> : Backward<4>;
  run(pool, t, read, x.typed_data(), kernel.typed_data(), gradient, channels, features, gx->typed_data(),
      gfactor->typed_data(), gbias->typed_data(), gkernel->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(winograd_forward, DispatchForward,
                              STRIDED.Attr<int64_t>("reading").Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
                                  .Arg<Array>().Ret<Array>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(winograd_backward, DispatchBackward,
                              STRIDED.Attr<int64_t>("reading").Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
                                  .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
                                  .Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>());
