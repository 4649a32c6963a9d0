// Convolution of a block of eight images. A tile is a pixel of all eight times two vectors of features, so images of
// any width fill it, and taps outside are left out instead of multiplied by zeros.

#pragma once

#include "pairs_bf16.h"

namespace {

constexpr int kStrip = 8;         // tiles whose sums stay in the first cache together
constexpr int kChunk = 16 << 10;  // bytes of a kernel that do beside them

// A kernel that makes `panels` times sixteen numbers of `pairs`, laid out as [two panels or the last one][tap][pair]
// [panel].
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
        int count = features - 16 * n;
        to[p.at(n, tap, c / 2)] = Pair(Rounded(LoadSome<Vec16>(from, count)),
                                       Rounded(LoadSome<Vec16>(from + features, c + 1 < channels ? count : 0)));
      }
  });
}

// Turned around, with channels and features exchanged.
void PackTurned(ffi::ThreadPool& pool, const Packed& p, const float* kernel, int channels, int features, Bits16* to) {
  ParallelFor(pool, p.panels, [=](int n) {
    for (int tap = 0; tap < p.taps; tap++)
      for (int f = 0; f < features; f += 16)
        for (int half = 0; half < 2; half++) {
          Eight pairs[8];
          for (int i = 0; i < 8; i++) {
            int c = 16 * n + 8 * half + i;
            const float* from = kernel + ((size_t)tap * channels + c) * features + f;
            pairs[i] = (Eight)Rounded(LoadSome<Vec16>(from, c < channels ? features - f : 0));
          }
          Transpose(pairs);
          for (int i = 0; i < std::min(8, p.pairs - f / 2); i++)
            std::memcpy((Eight*)&to[p.at(n, p.taps - 1 - tap, f / 2 + i)] + half, &pairs[i], sizeof(Eight));
        }
  });
}

// A tap, and how far from the origin the pixel lies that it meets.
struct Step {
  int tap;
  int64_t offset;
};

struct Steps {
  const Step* begin;
  int count;
};

// A pixel of the output, or two, `at` the first, and the taps that meet a pixel of the input for either.
struct Place {
  int at, count;
  std::vector<Step> steps;

  Steps all() const { return {steps.data(), (int)steps.size()}; }
  Steps only(int tap) const {
    for (const Step& step : steps)
      if (step.tap == tap) return {&step, 1};
    return {};
  }
};

// Where a line of `length` pixels of output reads a line of `extent` pixels of input, `distance` apart in scratch.
// Spread: the input's pixels stand `stride` apart among the output's, as in the gradient for the input.
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
        if (last >= 0 && first < extent) place.steps.push_back({tap, first * (int64_t)distance});
      }
      places.push_back(std::move(place));
    }
  return places;
}

// What a pass has summed up: pixels `step` apart in a row, for N vectors of features from `panel` on, as [place][pixel]
// [image][vector].
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

  // In bands of rows that stay in the second cache, `z` and the kernel's panels by turns.
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
    int total = places.size(), tap = packed.pairs * N * sizeof(Bits16);
    bool overlap = N == 1 && size == 3 && stride == 1 && 9 * tap <= kChunk;
    Vec16 sums[kStrip * 2 * kImages];
    for (int begin = 0; begin < total; begin += kStrip) {
      int count = std::min(kStrip, total - begin);
      bool first = true;
      auto chunk = [&](Steps down, int column, int pair, int pairs) {
        for (int i = 0; i < count; i++) {
          const Place& place = places[begin + i];
          Steps along = column < 0 ? place.all() : place.only(column);
          Vec16* to = sums + i * 2 * kImages;
          if (N == 2 || place.count == 1) Tile<1, N>(down, along, pair, pairs, z, kernel, first, to);
          else if (overlap) Overlapping(down, z + (place.at - 1) * in.pairs(), kernel, to);
          else Tile<2, 1>(down, along, pair, pairs, z, kernel, first, to);
        }
        first = false;
      };
      if (size * size * tap <= kChunk || row.steps.empty()) {
        chunk(row.all(), -1, 0, packed.pairs);
      } else if (size * tap <= kChunk) {
        for (const Step& step : row.steps) chunk({&step, 1}, -1, 0, packed.pairs);
      } else {
        int most = kChunk / (N * sizeof(Bits16));
        for (const Step& step : row.steps)
          for (int j = 0; j < size; j++)
            for (int c = 0; c < packed.pairs; c += most) chunk({&step, 1}, j, c, std::min(most, packed.pairs - c));
      }
      finish(Sums<N>{row.at, panel, count, spread ? stride : 1, &places[begin], sums});
    }
  }

  // Q pixels of eight images times N vectors of features, over some rows and columns of the kernel and some pairs.
  template <int Q, int N>
  ONCE void Tile(Steps down, Steps along, int pair, int pairs, const Eight* z, const Bits16* kernel, bool first,
                 Vec16* sums) const {
    size_t pixel = in.pairs() * (spread ? 1 : stride);
    Vec16 sum[Q * kImages * N];
#pragma GCC unroll 16
    for (int i = 0; i < Q * kImages * N; i++) sum[i] = first ? Vec16{} : sums[i];
    for (int i = 0; i < down.count; i++)
      for (int j = 0; j < along.count; j++) {
        const Eight* from = z + down.begin[i].offset + along.begin[j].offset + pair;
        const Bits16* k = kernel + ((down.begin[i].tap * size + along.begin[j].tap) * packed.pairs + pair) * N;
        for (int c = 0; c < pairs; c++, from++, k += N) {
#pragma GCC unroll 2
          for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
            for (int b = 0; b < kImages; b++) {
              Bits16 value = Broadcast(from[q * pixel][b]);
#pragma GCC unroll 2
              for (int n = 0; n < N; n++) {
                Vec16& to = sum[(q * kImages + b) * N + n];
                to = Dot(to, value, k[n]);
              }
            }
        }
      }
#pragma GCC unroll 16
    for (int i = 0; i < Q * kImages * N; i++) sums[i] = sum[i];
  }

  // Two pixels of eight images for one vector of features where windows of three overlap: what is read serves both. The
  // tile above would read once for each product, and be bound by that.
  ONCE void Overlapping(Steps down, const Eight* z, const Bits16* kernel, Vec16* sums) const {
    int pairs = packed.pairs;
    Vec16 sum[2 * kImages] = {};
    for (int i = 0; i < down.count; i++) {
      const Eight* from = z + down.begin[i].offset;
      const Bits16* k = kernel + 3 * down.begin[i].tap * pairs;
#pragma GCC unroll 1
      for (int c = 0; c < pairs; c++, from++, k++) {
        Bits16 taps[3] = {k[0], k[pairs], k[2 * pairs]};
#pragma GCC unroll 4
        for (int column = 0; column < 4; column++)
#pragma GCC unroll 8
          for (int b = 0; b < kImages; b++) {
            Bits16 value = Broadcast(from[column * pairs][b]);
#pragma GCC unroll 2
            for (int q = 0; q < 2; q++)
              if (Vec16& to = sum[q * kImages + b]; column >= q && column < q + 3)
                to = Dot(to, value, taps[column - q]);
          }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kImages; i++) sums[i] = sum[i];
  }
};

}  // namespace
