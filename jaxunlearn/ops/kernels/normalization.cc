// Batch normalisation, with residual sum and ReLU. Rows are pixels. A chunk of rows stays in a core's cache.

#include <cmath>

#include "common.h"

namespace {

struct Rows {
  int channels, step, count;  // rows of a chunk, chunks
  size_t rows;

  explicit Rows(const Array& x) : channels(x.dimensions().back()), rows(x.element_count() / channels) {
    step = std::max(1, (1 << 15) / channels);
    count = (rows + step - 1) / step;
  }
  size_t begin(int chunk) const { return (size_t)chunk * step * channels; }
  int size(int chunk) const { return std::min<size_t>(step, rows - (size_t)chunk * step); }
};

// sums[c] += term(row * channels + c) over rows.
template <class T>
inline void AddRows(int rows, int channels, float* __restrict sums, T term) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    size_t at = (size_t)r * channels;
#pragma GCC ivdep
    for (int c = 0; c < channels; c++)
      sums[c] += (term(at + c, c) + term(at + channels + c, c)) +
                 (term(at + 2 * channels + c, c) + term(at + 3 * channels + c, c));
  }
  for (; r < rows; r++)
    for (int c = 0; c < channels; c++) sums[c] += term((size_t)r * channels + c, c);
}

ffi::Error Normalise(ffi::ThreadPool pool, bool add, bool relu, float eps, Array x, Array scale, Array bias,
                     Array residual, Result y, Result mean, Result var) {
  Rows r(x);
  int channels = r.channels;
  const float *xs = x.typed_data(), *rs = residual.typed_data(), *biases = bias.typed_data();
  float *out = y->typed_data(), *means = mean->typed_data(), *vars = var->typed_data();
  // Mean and squared deviations of each chunk, then of all (Chan, Golub & LeVeque): `x` is read from memory once.
  std::vector<float> chunks((size_t)r.count * 2 * channels);
  float* parts = chunks.data();
  ParallelFor(pool, r.count, [=](int chunk) {
    const float* from = xs + r.begin(chunk);
    float *own = parts + (size_t)chunk * 2 * channels, *squares = own + channels;
    AddRows(r.size(chunk), channels, own, [=](size_t i, int) { return from[i]; });
    for (int c = 0; c < channels; c++) own[c] /= r.size(chunk);
    AddRows(r.size(chunk), channels, squares, [=](size_t i, int c) {
      float centred = from[i] - own[c];
      return centred * centred;
    });
  });
  std::vector<float> factors(channels);
  float* factor = factors.data();
  for (int c = 0; c < channels; c++) {
    double sum = 0, squares = 0;
    for (int k = 0; k < r.count; k++) sum += (double)r.size(k) * parts[(size_t)k * 2 * channels + c];
    double centre = sum / r.rows;
    for (int k = 0; k < r.count; k++) {
      double apart = parts[(size_t)k * 2 * channels + c] - centre;
      squares += parts[(size_t)k * 2 * channels + channels + c] + r.size(k) * apart * apart;
    }
    means[c] = centre;
    vars[c] = squares / r.rows;
    factor[c] = scale.typed_data()[c] / std::sqrt(vars[c] + eps);
  }
  auto write = [=](int chunk, auto finish) {
    size_t begin = r.begin(chunk);
    for (int row = 0; row < r.size(chunk); row++, begin += channels) {
#pragma GCC ivdep
      for (int c = 0; c < channels; c++)
        out[begin + c] = finish(begin + c, (xs[begin + c] - means[c]) * factor[c] + biases[c]);
    }
  };
  auto positive = [](float v) { return v < 0 ? 0.f : v; };  // NaN stays NaN
  ParallelFor(pool, r.count, [=](int chunk) {
    if (add && relu) write(chunk, [=](size_t i, float v) { return positive(v + rs[i]); });
    else if (add) write(chunk, [=](size_t i, float v) { return v + rs[i]; });
    else if (relu) write(chunk, [=](size_t, float v) { return positive(v); });
    else write(chunk, [=](size_t, float v) { return v; });
  });
  return ffi::Error::Success();
}

// `dresidual` is the gradient behind ReLU's, written if `add`.
template <bool add, bool relu>
void NormaliseGradient(ffi::ThreadPool& pool, const Rows& r, const float* xs, const float* ys, const float* gs,
                       const float* scale, const float* means, const float* vars, const float* dmean,
                       const float* dvar, float eps, float* dx, float* dscale, float* dbias, float* dresidual) {
  int channels = r.channels;
  std::vector<float> chunks((size_t)r.count * 2 * channels);
  float* parts = chunks.data();
  auto gradient = [=](size_t i) {
    float g = gs[i];  // read in any case: a condition on a read would cost the vectors
    return relu ? (ys[i] > 0 ? g : 0.f) : g;
  };
  ParallelFor(pool, r.count, [=](int chunk) {
    float *biases = parts + (size_t)chunk * 2 * channels, *scales = biases + channels;
    size_t begin = r.begin(chunk);
    AddRows(r.size(chunk), channels, biases, [=](size_t i, int) { return gradient(begin + i); });
    AddRows(r.size(chunk), channels, scales,
            [=](size_t i, int c) { return gradient(begin + i) * (xs[begin + i] - means[c]); });
  });
  // x reaches the output directly, through the mean and through the variance (Ioffe & Szegedy, section 3).
  std::vector<float> factors(3 * channels);
  float *direct = factors.data(), *along = direct + channels, *constant = along + channels;
  for (int c = 0; c < channels; c++) {
    double bias = 0, product = 0, std = std::sqrt(vars[c] + eps);
    for (int k = 0; k < r.count; k++) {
      bias += parts[(size_t)k * 2 * channels + c];
      product += parts[(size_t)k * 2 * channels + channels + c];
    }
    dbias[c] = bias;
    dscale[c] = product / std;
    direct[c] = scale[c] / std;
    along[c] = (2 * dvar[c] - direct[c] * product / (std * std)) / r.rows;
    constant[c] = (dmean[c] - direct[c] * bias) / r.rows;
  }
  ParallelFor(pool, r.count, [=](int chunk) {
    size_t begin = r.begin(chunk);
    for (int row = 0; row < r.size(chunk); row++, begin += channels) {
#pragma GCC ivdep
      for (int c = 0; c < channels; c++) {
        float g = gradient(begin + c);
        dx[begin + c] = g * direct[c] + (xs[begin + c] - means[c]) * along[c] + constant[c];
        if (add) dresidual[begin + c] = g;
      }
    }
  });
}

ffi::Error DispatchGradient(ffi::ThreadPool pool, bool add, bool relu, float eps, Array x, Array y, Array scale,
                            Array mean, Array var, Array g, Array dmean, Array dvar, Result dx, Result dscale,
                            Result dbias, Result dresidual) {
  auto run = [&]<bool kAdd, bool kRelu>() {
    NormaliseGradient<kAdd, kRelu>(pool, Rows(x), x.typed_data(), y.typed_data(), g.typed_data(), scale.typed_data(),
                                   mean.typed_data(), var.typed_data(), dmean.typed_data(), dvar.typed_data(), eps,
                                   dx->typed_data(), dscale->typed_data(), dbias->typed_data(),
                                   dresidual->typed_data());
  };
  if (add && relu) run.template operator()<true, true>();
  else if (add) run.template operator()<true, false>();
  else if (relu) run.template operator()<false, true>();
  else run.template operator()<false, false>();
  return ffi::Error::Success();
}

}  // namespace

#define NORMALISING THREADED.Attr<bool>("add").Attr<bool>("relu").Attr<float>("eps")

XLA_FFI_DEFINE_HANDLER_SYMBOL(normalise, Normalise,
                              NORMALISING.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>()
                                  .Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(normalise_gradient, DispatchGradient,
                              NORMALISING.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
                                  .Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>().Ret<Array>().Ret<Array>()
                                  .Ret<Array>());
