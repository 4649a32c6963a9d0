// What every convolution does with its images: reads them through the normalisation before it, leaves the moments of what
// it writes for the normalisation after it, and makes of the gradients of both the gradient of its output.

#pragma once

#include <cmath>

#include "elements.h"

// Memory of this thread, kept from call to call; each `slot` is a piece of its own.
template <class T = float>
T* Scratch(int slot, size_t size) {
  thread_local std::vector<std::vector<T>> memory(8);
  if (memory[slot].size() < size) memory[slot].resize(size);
  return memory[slot].data();
}

inline float Positive(float value) { return value < 0 ? 0.f : value; }  // NaN stays NaN
inline Vec16 Positive(Vec16 value) { return value < 0 ? Vec16{} : value; }

// Calls block<kFull>(channel) for blocks of 16 channels, kFull false for what is left over, of fewer.
template <class F>
inline void ForChannels(int channels, F block) {
  int c = 0;
  for (; c + 16 <= channels; c += 16) block.template operator()<true>(c, 16);
  if (c < channels) block.template operator()<false>(c, channels - c);
}

// Up to 16 numbers; those from `count` on are zero, and are not written.
template <bool kFull, class E>
inline Vec16 LoadSome(const E* from, int count) {
  if (kFull) return Load16(from);
  E whole[16] = {};
  std::memcpy(whole, from, count * sizeof(E));
  return Load16(whole);
}

template <bool kFull, class E>
inline void StoreSome(E* to, Vec16 value, int count) {
  if (kFull) return Store16(to, value);
  E whole[16];
  Store16(whole, value);
  std::memcpy(to, whole, count * sizeof(E));
}

// What is done with an image as it is read: nothing, (x - mean) * factor + bias, or ReLU of that.
struct Reading {
  enum Kind { kPlain, kNormalised, kPositive };
  int64_t kind;
  const float *mean, *factor, *bias;

  Vec16 operator()(Vec16 x, Vec16 mean, Vec16 factor, Vec16 bias) const {
    Vec16 z = (x - mean) * factor + bias;
    return kind == kPositive ? Positive(z) : z;
  }
};

// `rows` pixels of `x`, read.
template <class E, class T>
void Read(const Reading& reading, const E* x, int rows, int channels, T* z) {
  if (reading.kind == Reading::kPlain) {
    if constexpr (std::is_same_v<E, T>) {
      std::memcpy(z, x, (size_t)rows * channels * sizeof(E));
    } else {
      for (size_t i = 0; i < (size_t)rows * channels; i++) z[i] = FromFloat<T>(ToFloat(x[i]));
    }
    return;
  }
  ForChannels(channels, [&]<bool kFull>(int c, int n) {
    Vec16 mean = LoadSome<kFull>(reading.mean + c, n), factor = LoadSome<kFull>(reading.factor + c, n);
    Vec16 bias = LoadSome<kFull>(reading.bias + c, n);
    for (int r = 0; r < rows; r++) {
      size_t at = (size_t)r * channels + c;
      StoreSome<kFull>(z + at, reading(LoadSome<kFull>(x + at, n), mean, factor, bias), n);
    }
  });
}

// Mean and squared deviations from it of every channel, over `rows` pixels.
template <class E>
void Moments(const E* y, int rows, int channels, float* means, float* squares) {
  ForChannels(channels, [&]<bool kFull>(int c, int n) {
    auto sum = [&](auto term) {
      Vec16 sums[4] = {};
      int r = 0;
      for (; r + 4 <= rows; r += 4)
        for (int k = 0; k < 4; k++) sums[k] += term(LoadSome<kFull>(y + (size_t)(r + k) * channels + c, n));
      for (; r < rows; r++) sums[0] += term(LoadSome<kFull>(y + (size_t)r * channels + c, n));
      return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    };
    Vec16 mean = sum([](Vec16 v) { return v; }) / (float)rows;
    StoreSome<kFull>(means + c, mean, n);
    StoreSome<kFull>(squares + c, sum([=](Vec16 v) { return (v - mean) * (v - mean); }), n);
  });
}

// Mean and variance of all parts from `Moments` of each, [count, 2, channels], of `rows` pixels each (Chan, Golub &
// LeVeque).
inline void MergeMoments(const float* parts, int count, int rows, int channels, float* mean, float* var) {
  for (int c = 0; c < channels; c++) {
    double sum = 0, squares = 0;
    for (int k = 0; k < count; k++) sum += parts[(size_t)k * 2 * channels + c];
    double centre = sum / count;
    for (int k = 0; k < count; k++) {
      double apart = parts[(size_t)k * 2 * channels + c] - centre;
      squares += parts[((size_t)k * 2 + 1) * channels + c] + rows * apart * apart;
    }
    mean[c] = centre;
    var[c] = squares / ((double)count * rows);
  }
}

// The gradient of an output whose mean and variance went on too: gy + gmean / n + gvar * 2 (y - mean) / n.
struct OutputGradient {
  const float* mean;
  std::vector<float> constant, along;

  OutputGradient(int features, double n, const float* mean, const float* gmean, const float* gvar)
      : mean(mean), constant(features), along(features) {
    for (int f = 0; f < features; f++) constant[f] = gmean[f] / n, along[f] = 2 * gvar[f] / n;
  }

  template <class E, class T>
  void Write(const E* gy, const E* y, int rows, T* g) const {
    int features = constant.size();
    ForChannels(features, [&]<bool kFull>(int f, int n) {
      Vec16 c = LoadSome<kFull>(constant.data() + f, n), a = LoadSome<kFull>(along.data() + f, n);
      Vec16 m = LoadSome<kFull>(mean + f, n);
      for (int r = 0; r < rows; r++) {
        size_t at = (size_t)r * features + f;
        StoreSome<kFull>(g + at, LoadSome<kFull>(gy + at, n) + ((LoadSome<kFull>(y + at, n) - m) * a + c), n);
      }
    });
  }
};

// gx from gz, the gradient of what was read; adds to the sums behind the gradients of factor and bias.
template <class E>
void WriteInputGradient(const Reading& reading, const E* x, const float* gz, int rows, int channels, E* gx,
                        float* gfactor, float* gbias) {
  ForChannels(channels, [&]<bool kFull>(int c, int n) {
    bool plain = reading.kind == Reading::kPlain;
    Vec16 mean{}, factor{}, bias{}, products{}, sums{};
    if (!plain) {
      mean = LoadSome<kFull>(reading.mean + c, n), factor = LoadSome<kFull>(reading.factor + c, n);
      bias = LoadSome<kFull>(reading.bias + c, n);
    }
    for (int r = 0; r < rows; r++) {
      size_t at = (size_t)r * channels + c;
      Vec16 g = LoadSome<kFull>(gz + at, n);
      if (plain) {
        StoreSome<kFull>(gx + at, g, n);
        continue;
      }
      Vec16 centred = LoadSome<kFull>(x + at, n) - mean;
      if (reading.kind == Reading::kPositive) g = centred * factor + bias > 0 ? g : Vec16{};
      products += g * centred;
      sums += g;
      StoreSome<kFull>(gx + at, g * factor, n);
    }
    if (plain) return;
    StoreSome<kFull>(gfactor + c, LoadSome<kFull>(gfactor + c, n) + products, n);
    StoreSome<kFull>(gbias + c, LoadSome<kFull>(gbias + c, n) + sums, n);
  });
}
