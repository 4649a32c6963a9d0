// Convolution of bfloat16 that reads a normalised image and leaves the sums of the next BatchNorm, and its gradients.
//
// Eight images lie side by side in a thread's scratch, pixel by pixel: [row, column, pair of channels, image]. A tile is such a
// pixel of eight images times two vectors of features, so images of any width fill it, and taps outside are left out
// instead of multiplied by zeros. Products of pairs (vdpbf16ps) are over pairs of channels; the kernel's gradient, a sum
// over pixels, takes pairs of images. Any shape is right; fast are channels and features that are multiples of 16, and
// batches of 8.

#include <cmath>

#include "elements.h"

namespace {

typedef uint32_t Eight __attribute__((vector_size(32)));  // a pair of channels of every image

constexpr int kImages = 8;
constexpr int kStrip = 8;         // tiles whose sums stay in the first cache together
constexpr int kChunk = 16 << 10;  // bytes of a kernel that do beside them

// Memory of this thread, kept from call to call, one for each use.
template <int use, class T = Bits16>
T* Scratch(size_t size) {
  thread_local std::vector<T> memory;
  if (memory.size() < size) memory.resize(size);
  return memory.data();
}

// sum + a * b for pairs of bfloat16.
inline Vec16 Dot(Vec16 sum, Bits16 a, Bits16 b) {
#ifdef __AVX512BF16__
  return (Vec16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (Vec16)(a << 16) * (Vec16)(b << 16);
  return sum + (Vec16)(a & 0xffff0000) * (Vec16)(b & 0xffff0000);
#endif
}

inline Bits16 Broadcast(uint32_t pair) { return pair - Bits16{}; }

inline Half16 Rounded(Vec16 value) {
  Half16 half;
  Store16((BFloat16*)&half, value);
  return half;
}

inline Vec16 Widened(Half16 half) { return Load16((const BFloat16*)&half); }

inline Bits16 Pair(Half16 low, Half16 high) {
  return __builtin_convertvector(low, Bits16) | __builtin_convertvector(high, Bits16) << 16;
}

// Sixteen numbers, or as many as there are, then zeros.
template <class E>
inline Vec16 LoadFew(const E* from, int count) {
  if (count >= 16) return Load16(from);
  float few[16] = {};
  for (int i = 0; i < count; i++) few[i] = ToFloat(from[i]);
  return Load16(few);
}

template <class E>
inline void StoreFew(E* to, Vec16 value, int count) {
  if (count >= 16) return Store16(to, value);
  for (int i = 0; i < count; i++) to[i] = FromFloat<E>(value[i]);
}

// Parameters with zeros up to whole vectors.
std::vector<float> Whole(const float* from, int count) {
  std::vector<float> whole((count + 15) / 16 * 16);
  std::copy_n(from, count, whole.data());
  return whole;
}

// What a convolution reads or writes: of one image, or of a block of eight in scratch.
struct Images {
  int height, width, channels;

  int pairs() const { return (channels + 1) / 2; }
  int panels() const { return (channels + 15) / 16; }
  size_t image() const { return (size_t)height * width * channels; }
  size_t panel(int pad) const { return (size_t)height * (width + 2 * pad) * kImages / 2; }  // 16 channels in pairs of images
  size_t block(int pad) const { return (size_t)height * (width + 2 * pad) * pairs(); }
};

struct Shape {
  int batch, size, stride;
  Images in, out;

  Shape(const ffi::Span<const int64_t>& x, const ffi::Span<const int64_t>& y, int64_t size, int64_t stride)
      : batch(x[0]), size(size), stride(stride), in{(int)x[1], (int)x[2], (int)x[3]},
        out{(int)y[1], (int)y[2], (int)y[3]} {}

  int pad() const { return size / 2; }
  int taps() const { return size * size; }
  int blocks() const { return (batch + kImages - 1) / kImages; }
  int images(int block) const { return std::min(kImages, batch - block * kImages); }
  size_t kernel() const { return (size_t)taps() * in.channels * out.channels; }
  int pixels() const { return batch * out.height * out.width; }
};

// Eight pairs of channels of eight images, from [image][pair] to [pair][image].
inline void Transpose(Eight (&v)[8]) {
#pragma GCC unroll 3
  for (int round = 0; round < 3; round++) {
    Eight next[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      next[2 * i] = __builtin_shufflevector(v[i], v[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      next[2 * i + 1] = __builtin_shufflevector(v[i], v[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) v[i] = next[i];
  }
}

// Lays out a block of images with `pad` columns of zeros on both sides: `plain` [row, column, pair of channels, image] and
// `paired` [panel, row, column, pair of images, channel]; either may be null. value(offset, channel): sixteen numbers.
template <class V>
void Arrange(const Images& s, int images, int pad, Eight* plain, Bits16* paired, V value) {
  size_t margin = pad * s.pairs();
  auto row = [&]<bool kWhole>(int y) {
    for (int x = 0; x < s.width; x++)
      for (int c = 0; c < s.channels; c += 16) {
        size_t pixel = (size_t)y * s.width + x;
        int count = kWhole ? 16 : s.channels - c;
        Half16 halves[kImages];
#pragma GCC unroll 8
        for (int b = 0; b < kImages; b++)
          halves[b] = kWhole || b < images ? Rounded(value(b * s.image() + pixel * s.channels + c, c, count)) : Half16{};
        if (paired)
#pragma GCC unroll 4
          for (int b = 0; b < kImages / 2; b++)
            paired[c / 16 * s.panel(pad) + (pixel + (2 * y + 1) * pad) * (kImages / 2) + b] =
                Pair(halves[2 * b], halves[2 * b + 1]);
        if (plain) {
          Eight pairs[8];
#pragma GCC unroll 8
          for (int b = 0; b < kImages; b++) pairs[b] = (Eight)halves[b];
          Transpose(pairs);
          int most = kWhole ? 8 : std::min(8, s.pairs() - c / 2);
          for (int i = 0; i < most; i++) *plain++ = pairs[i];
        }
      }
  };
  bool whole = images == kImages && s.channels % 16 == 0;
  for (int y = 0; y < s.height; y++) {
    for (int n = 0; paired && n < s.panels(); n++)
      for (int x : {0, pad + s.width})
        std::fill_n(paired + n * s.panel(pad) + ((size_t)y * (s.width + 2 * pad) + x) * (kImages / 2),
                    pad * (kImages / 2), Bits16{});
    if (plain) plain = std::fill_n(plain, margin, Eight{});
    if (whole) row.template operator()<true>(y);
    else row.template operator()<false>(y);
    if (plain) plain = std::fill_n(plain, margin, Eight{});
  }
}

// x as the convolution sees it; read as it is, it is normalised by nothing.
struct Reading {
  std::vector<float> mean, factor, bias;
  float least;

  Reading(int reading, int channels, const Array& mean, const Array& factor, const Array& bias)
      : mean(Whole(mean.typed_data(), channels)), factor(Whole(factor.typed_data(), channels)),
        bias(Whole(bias.typed_data(), channels)), least(reading == 2 ? 0.f : -INFINITY) {
    if (reading != 0) return;
    std::fill(this->mean.begin(), this->mean.end(), 0.f);
    std::fill(this->factor.begin(), this->factor.end(), 1.f);
    std::fill(this->bias.begin(), this->bias.end(), 0.f);
  }

  Vec16 operator()(Vec16 x, int c) const {
    Vec16 v = (x - Load16(&mean[c])) * Load16(&factor[c]) + Load16(&bias[c]), low = least - Vec16{};
    return v < low ? low : v;
  }
};

// A kernel, from which `out` panels of sixteen results are made, as [two panels or the last one][tap][pair][panel].
struct Packed {
  int taps, pairs, panels;

  size_t size() const { return (size_t)panels * taps * pairs; }
  int together(int panel) const { return std::min(2, panels - panel / 2 * 2); }
  size_t at(int panel, int tap, int pair) const {
    return (size_t)panel / 2 * 2 * taps * pairs + ((size_t)tap * pairs + pair) * together(panel) + panel % 2;
  }
};

void Pack(ffi::ThreadPool& pool, const Packed& p, const float* kernel, int channels, int features, Bits16* to) {
  ParallelFor(pool, p.panels, [=](int n) {
    for (int tap = 0; tap < p.taps; tap++)
      for (int c = 0; c < channels; c += 2) {
        const float* from = kernel + ((size_t)tap * channels + c) * features + 16 * n;
        to[p.at(n, tap, c / 2)] = Pair(Rounded(LoadFew(from, features - 16 * n)),
                                       Rounded(LoadFew(from + features, c + 1 < channels ? features - 16 * n : 0)));
      }
  });
}

// Turned around, with channels and features exchanged.
void PackTurned(ffi::ThreadPool& pool, const Packed& p, const float* kernel, int channels, int features, Bits16* to) {
  ParallelFor(pool, p.panels, [=](int n) {
    for (int tap = 0; tap < p.taps; tap++)
      for (int f = 0; f < features; f += 16)
        for (int lane = 0; lane < 16; lane++) {
          int c = 16 * n + lane;
          Half16 half = Rounded(LoadFew(kernel + ((size_t)tap * channels + c) * features + f, c < channels ? features - f : 0));
          uint32_t pairs[8];
          std::memcpy(pairs, &half, sizeof(pairs));
          for (int i = 0; i < 8 && f / 2 + i < p.pairs; i++) to[p.at(n, p.taps - 1 - tap, f / 2 + i)][lane] = pairs[i];
        }
  });
}

// A tap, and how far from the origin the pixel lies that it meets.
struct Step {
  int tap;
  int64_t offset;
};

// Pixels `at` and `at + apart` of the output (or the first alone) and the taps that meet a pixel of the input for either.
struct Place {
  int at, count;
  std::vector<Step> steps;
};

// Where a line of `length` pixels of output reads a line of `extent` pixels of input, `distance` apart in scratch. Spread:
// the input's pixels stand `stride` apart among the output's, as in the gradient for the input.
std::vector<Place> Places(int length, int extent, int size, int stride, bool spread, int together, size_t distance) {
  std::vector<Place> places;
  int apart = spread ? stride : 1;
  for (int phase = 0; phase < apart; phase++)
    for (int at = phase; at < length; at += together * apart) {
      Place place{at, at + (together - 1) * apart < length ? together : 1, {}};
      for (int tap = 0; tap < size; tap++) {
        int first = (spread ? at : at * stride) + tap - size / 2;
        if (spread && first % stride != 0) continue;
        if (spread) first /= stride;
        int last = first + (place.count - 1) * (spread ? 1 : stride);
        if (last >= 0 && first < extent)
          place.steps.push_back({tap, first * (int64_t)distance});
      }
      places.push_back(std::move(place));
    }
  return places;
}

// Q pixels of eight images times N vectors of features, over some rows and columns of the kernel and `pairs` of channels.
template <int Q, int N>
inline void Tile(const Step* row, int rows, const Step* column, int columns, int size, int pairs, size_t kernel_tap,
                 size_t pixel, const Eight* z, const Bits16* kernel, bool first, Vec16* sums) {
  Vec16 sum[Q][kImages][N];
  for (int i = 0; i < Q * kImages * N; i++) (&sum[0][0][0])[i] = first ? Vec16{} : sums[i];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < columns; j++) {
      const Eight* from = z + row[i].offset + column[j].offset;
      const Bits16* k = kernel + (row[i].tap * size + column[j].tap) * kernel_tap;
      for (int c = 0; c < pairs; c++, from++, k += N) {
#pragma GCC unroll 2
        for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
          for (int b = 0; b < kImages; b++) {
            Bits16 value = Broadcast(from[q * pixel][b]);
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) sum[q][b][n] = Dot(sum[q][b][n], value, k[n]);
          }
      }
    }
  for (int i = 0; i < Q * kImages * N; i++) sums[i] = (&sum[0][0][0])[i];
}

// Two pixels of eight images for one vector of features where windows of three overlap: what is read serves both. With
// one vector, the tile above must read once for each product.
inline void TileOverlapping(const Step* row, int rows, int pairs, const Eight* z, const Bits16* kernel, Vec16* sums) {
  Vec16 sum[2][kImages] = {};
  for (int i = 0; i < rows; i++) {
    const Eight* from = z + row[i].offset;
    const Bits16* k = kernel + 3 * row[i].tap * pairs;
#pragma GCC unroll 1
    for (int c = 0; c < pairs; c++, from++, k++) {
      Bits16 taps[3] = {k[0], k[pairs], k[2 * pairs]};
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++)
#pragma GCC unroll 8
        for (int b = 0; b < kImages; b++) {
          Bits16 value = Broadcast(from[q * pairs][b]);
          if (q > 0 && q < 3) sum[1][b] = Dot(sum[1][b], value, taps[q - 1]);
          if (q == 3) sum[1][b] = Dot(sum[1][b], value, taps[2]);
          if (q < 3) sum[0][b] = Dot(sum[0][b], value, taps[q]);
        }
    }
  }
  for (int i = 0; i < 2 * kImages; i++) sums[i] = (&sum[0][0])[i];
}

// What a pass has summed up: pixels `step` apart in a row, for N vectors of features from `panel` on. [place][pixel][image]
// [vector].
template <int N>
struct Sums {
  int row, panel, length, step;
  const Place* places;
  Vec16* sums;

  // visit(vector, which of images, where in the image at the first of its sixteen features).
  template <bool kWhole, class F>
  void Visit(const Images& s, int images, int n, F visit) const {
    size_t image = s.image();
    for (int i = 0; i < length; i++)
      for (int q = 0; q < places[i].count; q++) {
        Vec16* at = sums + (i * 2 / N + q) * kImages * N + n;
        size_t pixel = ((size_t)row * s.width + places[i].at + q * step) * s.channels + 16 * (panel + n);
#pragma GCC unroll 8
        for (int b = 0; b < kImages; b++)
          if (kWhole || b < images) visit(at[b * N], b, pixel + b * image);
      }
  }

  int pixels() const {
    int count = 0;
    for (int i = 0; i < length; i++) count += places[i].count;
    return count;
  }
};

// All pixels of a block: a convolution, or (spread) its gradient for the input. finish(sums) is given every strip.
struct Pass {
  Images in, out;
  int size, stride;
  bool spread;
  Packed packed;
  std::vector<Place> rows, columns[2];  // one or two pixels together

  Pass(const Images& in, const Images& out, int size, int stride, bool spread)
      : in(in), out(out), size(size), stride(stride), spread(spread), packed{size * size, in.pairs(), out.panels()} {
    rows = Places(out.height, in.height, size, stride, spread, 1, (in.width + size / 2 * 2) * in.pairs());
    for (int i = 0; i < 2; i++) columns[i] = Places(out.width, in.width, size, stride, spread, i + 1, in.pairs());
  }

  template <class F>
  void Run(const Eight* z, const Bits16* kernel, F finish) const {
    z += size / 2 * in.pairs();
    int band = std::max<size_t>(1, (256 << 10) / (in.width * in.pairs() * sizeof(*z)));
    for (size_t y = 0; y < rows.size(); y += band)
      for (int n = 0; n < packed.panels; n += 2)
        for (size_t i = y; i < std::min(rows.size(), y + band); i++) {
          const Bits16* panels = kernel + packed.at(n, 0, 0);
          if (packed.together(n) == 2) Row<2>(rows[i], n, z, panels, finish);
          else Row<1>(rows[i], n, z, panels, finish);
        }
  }

  // In strips, and for each in chunks of the kernel that stay in the first cache: all of it, a row, or some channels of
  // a tap.
  template <int N, class F>
  void Row(const Place& row, int panel, const Eight* z, const Bits16* kernel, F finish) const {
    const auto& places = columns[2 - N];
    const std::vector<Step>& taps = row.steps;
    int tap = packed.pairs * N * sizeof(Bits16), total = places.size();
    Vec16 sums[kStrip][2 * kImages];
    bool overlap = size == 3 && stride == 1 && 9 * tap <= kChunk;
    for (int begin = 0; begin < total; begin += kStrip) {
      int count = std::min(kStrip, total - begin);
      bool first = true;
      auto chunk = [&](const Step* at, int length, int only, int pair, int pairs) {
        for (int i = 0; i < count; i++) {
          const Place& place = places[begin + i];
          const Step* column = place.steps.data();
          int columns = place.steps.size();
          if (only >= 0) {
            while (columns > 0 && column->tap != only) column++, columns--;
            columns = std::min(columns, 1);
          }
          if (N == 1 && place.count == 2 && overlap) {
            TileOverlapping(at, length, pairs, z + (place.at - 1) * pairs, kernel, (Vec16*)sums[i]);
            continue;
          }
          auto run = [&]<int Q>() {
            Tile<Q, N>(at, length, column, columns, size, pairs, packed.pairs * N,
                       in.pairs() * (spread ? 1 : stride), z + pair, kernel + pair * N, first, (Vec16*)sums[i]);
          };
          if (N == 1 && place.count == 2) run.template operator()<3 - N>();
          else run.template operator()<1>();
        }
        first = false;
      };
      if (size * size * tap <= kChunk || taps.empty()) {
        chunk(taps.data(), taps.size(), -1, 0, packed.pairs);
      } else if (size * tap <= kChunk) {
        for (const Step& step : taps) chunk(&step, 1, -1, 0, packed.pairs);
      } else {
        int most = kChunk / (N * sizeof(Bits16));
        for (const Step& step : taps)
          for (int j = 0; j < size; j++)
            for (int c = 0; c < packed.pairs; c += most) chunk(&step, 1, j, c, std::min(most, packed.pairs - c));
      }
      finish(Sums<N>{row.at, panel, count, spread ? stride : 1, &places[begin], &sums[0][0]});
    }
  }
};

// Stores sums, rounded, and merges their mean and squared deviations from it into those of `before` pixels (Chan, Golub &
// LeVeque).
template <bool kWhole, int N>
void StoreAndAdd(Sums<N> sums, Images s, int images, int n, BFloat16* y, float* mean, int& before) {
  float* squares = mean + 16 * s.panels();
  int lanes = kWhole ? 16 : std::min(16, s.channels - 16 * (sums.panel + n)), pixels = sums.pixels() * images;
  Vec16 total[4] = {}, apart[4] = {};
  sums.template Visit<kWhole>(s, images, n, [&total, y, lanes](Vec16& v, int b, size_t at) {
    Half16 half = Rounded(v);
    if (kWhole) std::memcpy(y + at, &half, sizeof(half));
    else std::memcpy(y + at, &half, lanes * sizeof(*y));
    v = Widened(half);
    total[b % 4] += v;
  });
  Vec16 own = (total[0] + total[1] + (total[2] + total[3])) / (float)pixels;
  sums.template Visit<kWhole>(s, images, n, [&apart, own](Vec16 v, int b, size_t) { apart[b % 4] += (v - own) * (v - own); });
  Vec16 change = own - Load16(mean);
  float share = (float)pixels / (pixels + before);
  Store16(mean, Load16(mean) + change * share);
  Store16(squares, Load16(squares) + (apart[0] + apart[1] + (apart[2] + apart[3])) + change * change * (share * before));
  before += pixels;
}

using Half = ArrayOf<BFloat16>;
using HalfResult = ResultOf<BFloat16>;

ffi::Error Forward(ffi::ThreadPool pool, int64_t stride, int64_t reading, Half x, Array mean, Array factor, Array bias,
                   Array kernel, HalfResult y, Result ymean, Result yvar) {
  Shape s(x.dimensions(), y->dimensions(), kernel.dimensions()[0], stride);
  Pass pass(s.in, s.out, s.size, s.stride, false);
  Reading read(reading, s.in.channels, mean, factor, bias);
  Bits16* packed = Scratch<0>(pass.packed.size());
  Pack(pool, pass.packed, kernel.typed_data(), s.in.channels, s.out.channels, packed);
  const BFloat16* images = Data<const BFloat16>(x);
  BFloat16* results = Data<BFloat16>(*y);
  int lanes = 16 * s.out.panels(), features = s.out.channels;
  std::vector<float> parts((size_t)s.blocks() * 2 * lanes);
  float* moments = parts.data();
  ParallelFor(pool, s.blocks(), [=, &pass, &read](int block) {
    int count = s.images(block);
    Eight* z = Scratch<1, Eight>(s.in.block(s.pad()));
    const BFloat16* from = images + (size_t)block * kImages * s.in.image();
    BFloat16* to = results + (size_t)block * kImages * s.out.image();
    Arrange(s.in, count, s.pad(), z, nullptr, [&](size_t i, int c, int lanes) { return read(LoadFew(from + i, lanes), c); });
    std::vector<int> before(s.out.panels());
    pass.Run(z, packed, [&]<int N>(const Sums<N>& sums) {
      for (int n = 0; n < N; n++) {
        int panel = sums.panel + n, lanes = features - 16 * panel;
        float* at = moments + ((size_t)block * 2 * s.out.panels() + panel) * 16;
        if (count == kImages && lanes >= 16) StoreAndAdd<true>(sums, s.out, count, n, to, at, before[panel]);
        else StoreAndAdd<false>(sums, s.out, count, n, to, at, before[panel]);
      }
    });
  });
  for (int f = 0; f < features; f++) {
    double sum = 0, squares = 0;
    auto part = [&](int block) { return moments + (size_t)block * 2 * lanes + f; };
    for (int i = 0; i < s.blocks(); i++) sum += (double)s.images(i) * *part(i);
    double centre = sum / s.batch;
    for (int i = 0; i < s.blocks(); i++) {
      double apart = *part(i) - centre;
      squares += part(i)[lanes] + (double)s.images(i) * s.out.height * s.out.width * apart * apart;
    }
    ymean->typed_data()[f] = centre;
    yvar->typed_data()[f] = squares / s.pixels();
  }
  return ffi::Error::Success();
}

// Pixels in a row of the output, and where they and the input's pixels lie among the paired images.
struct Span {
  size_t x, g;
  int count;
};

// Gradients of M channels' taps for N vectors of features, or of N taps for one, that lie `apart` in g and `out_apart` in
// the gradient.
template <int M, int N>
inline void AddTaps(const std::vector<Span>& spans, int stride, const Bits16* x, int channel, const Bits16* g,
                    int64_t apart, float* gradient, size_t out_apart, int channels, int features, int lanes) {
  Vec16 sum[M][N] = {};
  for (const Span& span : spans) {
    const Bits16 *at = x + span.x, *from = g + span.g;
    for (int i = 0; i < span.count; i++, at += (stride - 1) * kImages / 2)
#pragma GCC unroll 1
      for (int b = 0; b < kImages / 2; b++, at++, from++) {
        Bits16 v[N];
        for (int n = 0; n < N; n++) v[n] = from[n * apart];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          Bits16 value = Broadcast((*at)[channel + m]);
#pragma GCC unroll 3
          for (int n = 0; n < N; n++) sum[m][n] = Dot(sum[m][n], value, v[n]);
        }
      }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 3
    for (int n = 0; n < N && m < channels; n++) {
      float* to = gradient + (size_t)m * features + n * out_apart;
      StoreFew(to, LoadFew(to, lanes) + sum[m][n], lanes);
    }
}

// Adds the gradient of `panels` panels of the kernel's channels from `panel` on, over `blocks` blocks that lie `xs` and
// `gs` apart. Some pixels at a time, whose panels stay in the first cache.
void AddKernelGradient(const Shape& s, int panel, int panels, int blocks, const Bits16* x, size_t xs, const Bits16* g,
                       size_t gs, float* gradient) {
  int rows = std::max(1, 32 / s.out.width), together = std::max(1, 32 / (s.out.width * s.out.height));
  // With one vector of features, whole rows of taps share what is read of x.
  bool overlap = s.size == 3 && s.stride == 1 && s.out.panels() == 1;
  std::vector<std::vector<Span>> spans(s.taps());
  for (int block = 0; block < blocks; block += together)
    for (int row = 0; row < s.out.height; row += rows) {
      for (int tap = 0; tap < s.taps(); tap++) {
        spans[tap].clear();
        int i = tap / s.size - s.pad(), j = tap % s.size - s.pad();
        int first = j < 0 ? (-j + s.stride - 1) / s.stride : 0;
        int last = overlap ? first + s.in.width : std::min(s.out.width, (s.in.width - j + s.stride - 1) / s.stride);
        for (int b = block; b < std::min(blocks, block + together); b++)
          for (int y = row; y < std::min(s.out.height, row + rows); y++) {
            int at = y * s.stride + i;
            if (at < 0 || at >= s.in.height || first >= last) continue;
            spans[tap].push_back(
                {b * xs + ((size_t)at * s.in.width + first * s.stride + j) * (kImages / 2),
                 b * gs + ((size_t)y * (s.out.width + 2 * s.pad()) + s.pad() + first) * (kImages / 2), last - first});
          }
      }
      int channels = s.in.channels, features = s.out.channels;
      for (int n = panel; n < panel + panels; n++)
        for (int f = 0, vectors; f < s.out.panels(); f += vectors) {
          int lanes = features - 16 * f;
          vectors = lanes >= 32 ? 2 : 1;
          for (int tap = 0; tap < s.taps(); tap += overlap ? 3 : 1) {
            auto add = [&]<int M, int N>(int channel, int64_t apart, size_t out_apart) {
              int c = 16 * n + channel;
              AddTaps<M, N>(spans[tap], s.stride, x + n * s.in.panel(0), channel, g + f * s.out.panel(s.pad()), apart,
                            gradient + ((size_t)tap * channels + c) * features + 16 * f, out_apart, channels - c,
                            features, lanes);
            };
            for (int channel = 0; channel < 16; channel += 8)
              if (overlap) add.template operator()<8, 3>(channel, -kImages / 2, channels * features);
              else if (vectors == 2) add.template operator()<8, 2>(channel, s.out.panel(s.pad()), 16);
            if (!overlap && vectors == 1) add.template operator()<16, 1>(0, 0, 0);
          }
        }
    }
}

// Stores the gradient for x, and adds those of factor and bias to `sums` [factor or bias][channel].
template <bool kWhole, int N>
void StoreInputGradient(Sums<N> gz, Images s, int images, int n, int reading, const Reading& read, const BFloat16* x,
                        BFloat16* gx, float* sums) {
  int c = 16 * (gz.panel + n), lanes = kWhole ? 16 : s.channels - c;
  Vec16 factor = Load16(&read.factor[c]), mean = Load16(&read.mean[c]), bias = Load16(&read.bias[c]);
  Vec16 factors[2] = {}, biases[2] = {};
  auto visit = [&](auto mask) {
    gz.template Visit<kWhole>(s, images, n, [&factors, &biases, mask, x, gx, lanes, mean, factor](Vec16 v, int b, size_t at) {
      Vec16 apart = LoadFew(x + at, lanes) - mean;
      v = mask(v, apart);
      biases[b % 2] += v;
      factors[b % 2] += v * apart;
      StoreFew(gx + at, v * factor, lanes);
    });
  };
  if (reading == 2) visit([factor, bias](Vec16 v, Vec16 apart) { return apart * factor + bias > 0 ? v : Vec16{}; });
  else visit([](Vec16 v, Vec16) { return v; });
  if (reading == 0) return;
  Store16(sums, Load16(sums) + (factors[0] + factors[1]));
  sums += 16 * s.panels();
  Store16(sums, Load16(sums) + (biases[0] + biases[1]));
}

ffi::Error Backward(ffi::ThreadPool pool, int64_t stride, int64_t reading, Half x, Array mean, Array factor, Array bias,
                    Array kernel, Half y, Array ymean, Half gy, Array gmean, Array gvar, HalfResult gx, Result gfactor,
                    Result gbias, Result gkernel) {
  Shape s(x.dimensions(), y.dimensions(), kernel.dimensions()[0], stride);
  int channels = s.in.channels, features = s.out.channels, lanes = 16 * s.in.panels();
  Pass pass(s.out, s.in, s.size, s.stride, true);
  Reading read(reading, channels, mean, factor, bias);
  Bits16* packed = Scratch<0>(pass.packed.size());
  PackTurned(pool, pass.packed, kernel.typed_data(), channels, features, packed);
  // g = gy + along * (y - ymean) + constant.
  std::vector<float> along = Whole(gvar.typed_data(), features), constant = Whole(gmean.typed_data(), features),
                     centre = Whole(ymean.typed_data(), features);
  for (float& v : along) v *= 2.f / s.pixels();
  for (float& v : constant) v /= s.pixels();
  // Each group of blocks adds up a gradient of its own where that is small beside the images. Else the images are
  // kept for a second visit that divides the kernel.
  bool own = kGroups * s.kernel() <= s.batch * (s.in.image() + s.out.image());
  size_t xs = s.in.panels() * s.in.panel(0), gs = s.out.panels() * s.out.panel(s.pad());
  Bits16* kept = own ? nullptr : Scratch<1>(s.blocks() * (xs + gs));
  const BFloat16 *xdata = Data<const BFloat16>(x), *ydata = Data<const BFloat16>(y), *gdata = Data<const BFloat16>(gy);
  BFloat16* out = Data<BFloat16>(*gx);
  float* gradient = gkernel->typed_data();
  std::vector<float> all(2 * lanes + (own ? s.kernel() : 0));
  SumOfGroups(pool, all.size(), all.data(), [&, own, kept](int group, float* sums) {
    for (int block = group; block < s.blocks(); block += kGroups) {
      int count = s.images(block);
      Bits16* x2 = own ? Scratch<2>(xs + gs) : kept + block * xs;
      Bits16* g2 = own ? x2 + xs : kept + s.blocks() * xs + block * gs;
      Eight* g = Scratch<3, Eight>(s.out.block(s.pad()));
      size_t first = (size_t)block * kImages * s.in.image(), second = (size_t)block * kImages * s.out.image();
      Arrange(s.out, count, s.pad(), g, g2, [&](size_t i, int f, int lanes) {
        Vec16 apart = LoadFew(ydata + second + i, lanes) - Load16(&centre[f]);
        return LoadFew(gdata + second + i, lanes) + Load16(&along[f]) * apart + Load16(&constant[f]);
      });
      Arrange(s.in, count, 0, nullptr, x2,
              [&](size_t i, int c, int lanes) { return read(LoadFew(xdata + first + i, lanes), c); });
      pass.Run(g, packed, [&]<int N>(const Sums<N>& gz) {
        for (int n = 0; n < N; n++) {
          int c = 16 * (gz.panel + n);
          auto store = [&]<bool kWhole>() {
            StoreInputGradient<kWhole>(gz, s.in, count, n, reading, read, xdata + first, out + first, sums + c);
          };
          if (count == kImages && c + 16 <= channels) store.template operator()<true>();
          else store.template operator()<false>();
        }
      });
      if (own) AddKernelGradient(s, 0, s.in.panels(), 1, x2, xs, g2, gs, sums + 2 * lanes);
    }
  });
  std::copy_n(all.data(), channels, gfactor->typed_data());
  std::copy_n(all.data() + lanes, channels, gbias->typed_data());
  if (own) {
    std::copy_n(all.data() + 2 * lanes, s.kernel(), gradient);
  } else {
    ParallelFor(pool, s.in.panels(), [=](int panel) {
      for (int tap = 0; tap < s.taps(); tap++)
        std::fill_n(gradient + ((size_t)tap * channels + 16 * panel) * features,
                    std::min(16, channels - 16 * panel) * features, 0.f);
      AddKernelGradient(s, panel, 1, s.blocks(), kept, xs, kept + s.blocks() * xs, gs, gradient);
    });
  }
  return ffi::Error::Success();
}

}  // namespace

#define READING STRIDED.Attr<int64_t>("reading").Arg<Half>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_forward_bf16, Forward, READING.Ret<Half>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(convolution_backward_bf16, Backward,
                              READING.Arg<Half>().Arg<Array>().Arg<Half>().Arg<Array>().Arg<Array>().Ret<Half>()
                                  .Ret<Array>().Ret<Array>().Ret<Array>());
