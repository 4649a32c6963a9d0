// What every convolution does with its images: it reads them through the normalisation before it, leaves the moments of
// what it writes for the normalisation after it, and makes of the gradients of both the gradient of its output.

#pragma once

#include <limits>

#include "elements.h"

// Numbers of channels, up to whole vectors of any width; behind the last, zeros.
inline int Padded(int channels) { return (channels + 15) / 16 * 16; }

// What x is read as: (x - mean) * factor + bias, but at least `floor`.
template <class V>
struct Normal {
  V mean, factor, bias;
  float floor;

  // In both of these NaN stays NaN.
  V operator()(V x) const { return OfCentred(x - mean); }
  V OfCentred(V centred) const {
    V z = centred * factor + bias, low = floor - V{};
    return low > z ? low : z;
  }
  // `g`, the gradient of what was read, where the floor let it through. One register fewer than by comparison with it.
  V Through(V g, V centred) const { return centred * factor + (bias - floor) > V{} ? g : V{}; }
};

// How an image is read: as it is, normalised, or ReLU of that. Read as it is, it is normalised by nothing.
class Reading {
 public:
  Reading(int64_t kind, int channels, const Array& mean, const Array& factor, const Array& bias)
      : any(kind != kPlain), floor_(kind == kPositive ? 0.f : -std::numeric_limits<float>::infinity()),
        size_(Padded(channels)), parameters_(3 * size_) {
    const Array* of[] = {&mean, &factor, &bias};
    for (int i = 0; i < 3; i++)
      for (int c = 0; c < channels; c++) parameters_[i * size_ + c] = any ? of[i]->typed_data()[c] : i == 1;
  }

  // Of the channels from `c` on.
  template <class V = Wide>
  Normal<V> At(int c) const {
    const float* at = parameters_.data() + c;
    return {Load<V>(at), Load<V>(at + size_), Load<V>(at + 2 * size_), floor_};
  }

  // The gradients of factor and bias from their sums: zero where neither was read.
  void Put(const float* factors, const float* biases, int channels, float* gfactor, float* gbias) const {
    for (int c = 0; c < channels; c++) gfactor[c] = any ? factors[c] : 0, gbias[c] = any ? biases[c] : 0;
  }

  const bool any;

 private:
  enum { kPlain, kNormalised, kPositive };
  float floor_;
  size_t size_;
  std::vector<float> parameters_;
};

// gy + gmean / N + gvar * 2 (y - mean) / N: what a pixel of y hands back by itself and through the moments of all.
template <class V>
struct Handed {
  V mean, slope, constant;

  V operator()(V gy, V y) const { return gy + ((y - mean) * slope + constant); }
};

class OutputGradient {
 public:
  // `pixels`: N.
  OutputGradient(double pixels, const Array& mean, const Array& gmean, const Array& gvar)
      : size_(Padded(mean.element_count())), parameters_(3 * size_) {
    for (size_t f = 0; f < mean.element_count(); f++) {
      parameters_[f] = mean.typed_data()[f];
      parameters_[f + size_] = 2 * gvar.typed_data()[f] / pixels;
      parameters_[f + 2 * size_] = gmean.typed_data()[f] / pixels;
    }
  }

  // Of the features from `f` on.
  template <class V = Wide>
  Handed<V> At(int f) const {
    const float* at = parameters_.data() + f;
    return {Load<V>(at), Load<V>(at + size_), Load<V>(at + 2 * size_)};
  }

 private:
  size_t size_;
  std::vector<float> parameters_;
};

// Makes of sums of `count` numbers' deviations from `shift`, and of their squares, the mean and the squared deviations
// from that. Of equal numbers these are rounding alone, which may be below zero; NaN stays NaN.
inline void Centre(float shift, float count, float& total, float& squares) {
  squares -= total * total / count;
  if (squares < 0) squares = 0;
  total = shift + total / count;
}

// Mean and variance of all pixels from those of parts (Chan, Golub & LeVeque). Part k is of pixels(k) pixels: their
// mean lies at moments + 2 * k * size, and `size` behind it the sum of squared deviations from that.
template <class Pixels>
void MergeMoments(int parts, Pixels pixels, const float* moments, size_t size, int channels, float* mean,
                  float* variance) {
  std::vector<double> centre(channels), squares(channels);
  double total = 0;
  for (int k = 0; k < parts; k++, moments += 2 * size) {
    total += pixels(k);
    for (int c = 0; c < channels; c++) centre[c] += pixels(k) * (double)moments[c];
  }
  for (double& sum : centre) sum /= total;
  moments -= 2 * parts * size;
  for (int k = 0; k < parts; k++, moments += 2 * size)
    for (int c = 0; c < channels; c++) {
      double apart = moments[c] - centre[c];
      squares[c] += moments[size + c] + pixels(k) * apart * apart;
    }
  for (int c = 0; c < channels; c++) mean[c] = centre[c], variance[c] = squares[c] / total;
}

// What XLA hands to a convolution (`ops/fused.py`): stride, reading, x, mean, factor, bias, kernel; forward the results
// y, its mean and its variance; backward y, its mean and the gradients of all three, then the results: the gradients of
// x, factor, bias and kernel.
#define CONVOLUTION(E)                                                                                             \
  THREADED.Attr<int64_t>("stride").Attr<int64_t>("reading").Arg<ArrayOf<E>>().Arg<Array>().Arg<Array>()             \
      .Arg<Array>().Arg<Array>()
#define FORWARD(E) CONVOLUTION(E).Ret<ArrayOf<E>>().Ret<Array>().Ret<Array>()
#define GRADIENTS(E) CONVOLUTION(E).Arg<ArrayOf<E>>().Arg<Array>().Arg<ArrayOf<E>>().Arg<Array>().Arg<Array>()
#define BACKWARD(E) GRADIENTS(E).Ret<ArrayOf<E>>().Ret<Array>().Ret<Array>().Ret<Array>()
