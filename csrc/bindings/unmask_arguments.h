// The arguments and results that threshold_unmask and lm_head_unmask have in common.
#pragma once

#include <optional>

#include "bindings/launch.h"
#include "threshold_unmask/params.h"

namespace llada {

using OptionalTensor = std::optional<Tensor>;

template <class T>
const T* optional_data(const char* name, const OptionalTensor& x, ScalarType dtype, std::initializer_list<int64_t> shape,
                       const Beside& beside) {
  if (!x.has_value()) return nullptr;
  check_tensor(name, *x, dtype, shape, &beside);
  return static_cast<const T*>(x->const_data_ptr());
}

// Fills the fields of `p` that lie between the logits and the temperature, and allocates the results. `beside`: the logits, or what makes
// them.
class UnmaskCall {
 public:
  UnmaskCall(ThresholdUnmaskParams& p, const Beside& beside, const Tensor& tokens, const Tensor& threshold,
             const OptionalTensor& editing_threshold, const Tensor& min_unmask, const OptionalTensor& editable)
      : new_tokens_(empty_beside(tokens, {p.rows, p.length})),
        confidence_(empty_beside(tokens, {p.rows, p.length}, ScalarType::Float)),
        counts_(empty_beside(tokens, {p.rows, 2}, ScalarType::Int)),
        bad_(on_cuda(beside.x) ? 0 : size_t(p.rows * p.length)),
        length_(p.length) {
    check(0 <= p.mask_token_id && p.mask_token_id < p.vocab, "mask_token_id: expected an id in [0, ", p.vocab, "), got ", p.mask_token_id);
    check_tensor("tokens", tokens, ScalarType::Long, {p.rows, p.length}, &beside);
    check_tensor("threshold", threshold, ScalarType::Float, {p.rows}, &beside);
    check_tensor("min_unmask", min_unmask, ScalarType::Long, {p.rows}, &beside);
    p.tokens = static_cast<const int64_t*>(tokens.const_data_ptr());
    p.threshold = static_cast<const float*>(threshold.const_data_ptr());
    p.min_unmask = static_cast<const int64_t*>(min_unmask.const_data_ptr());
    p.editing_threshold = optional_data<float>("editing_threshold", editing_threshold, ScalarType::Float, {p.rows}, beside);
    p.editable = optional_data<bool>("editable", editable, ScalarType::Bool, {p.rows, p.length}, beside);
    p.new_tokens = static_cast<int64_t*>(new_tokens_.mutable_data_ptr());
    p.confidence = static_cast<float*>(confidence_.mutable_data_ptr());
    p.counts = static_cast<int32_t*>(counts_.mutable_data_ptr());
    p.bad = bad_.data();
  }

  // After the launch: the results, or the error in the logits, of which a GPU says nothing here (counts of -1 do).
  std::tuple<Tensor, Tensor, Tensor> results() const {
    for (int64_t i = 0; i < int64_t(bad_.size()); ++i) {
      const char kind = bad_[size_t(i)];
      const char* got = kind == 'n' ? "NaN" : kind == 'i' ? "+inf" : "no finite logit besides the mask token's";
      check(kind == 0, "logits: expected finite numbers, got ", got, " in row ", i / length_, ", position ", i % length_);
    }
    return {new_tokens_, confidence_, counts_};
  }

 private:
  Tensor new_tokens_, confidence_, counts_;
  std::vector<char> bad_;
  int64_t length_;
};

}  // namespace llada
