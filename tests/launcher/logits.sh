# I1, I2, I4 as a user can check them: logits of prefill, of decode, of other chunks, of shards.
source "$(dirname "$0")/check.sh"
compare=$5

logits() {
  local name=$1 ranks=$2
  shift 2
  done_by "$ranks" logits --model "$model" --tokens tokens.json --output "$name.safetensors" "$@"
}
# 700 tokens: ten tiles, with pruning and skipping, and an open one. No two tiles are alike: whether a tile is pruned
# that weighs exactly as much as another is up to rounding.
awk 'BEGIN {
  for (x = 1; n < 700; n++) {
    x = x * 16807 % 2147483647
    printf "%s%d", n ? "," : "[", x % 96 + 32
  }
  print "]"
}' >tokens.json
logits prefill 1
logits chunks 1 --prefill-chunk 100
logits decode 1 --decode
logits shards 2
logits shards-chunks 2 --tp 2 --prefill-chunk 64
for other in chunks decode shards shards-chunks; do
  "$compare" prefill.safetensors $other.safetensors || fail "prefill and $other"
done
# A change of one token must show from there on: the comparison can fail.
sed 's/,40,/,41,/' tokens.json >changed && ! cmp -s changed tokens.json && mv changed tokens.json
logits changed 1
if "$compare" prefill.safetensors changed.safetensors >/dev/null; then fail "other tokens have the same logits"; fi
