# Contexts of 1,048,576 and 4,194,304 tokens of the demo model. The pairs of tiles of the second are 86 thousand
# million: they and every offset must be counted in 64 bits. Tiles have a budget, whatever the length.
source "$(dirname "$0")/check.sh"
needs_gpu

awk 'BEGIN {
  for (i = 1; n < 4194304; i++) {
    line = "Chapter " i ". " \
      "It was the best of times, it was the worst of times, it was the age of number " i * i % 997 ".\n"
    n += length(line)
    printf "%s", line
  }
}' >text
for n in 1048576 4194304; do
  done_by 1 eval --device cuda --model "$model" --text text --max-tokens $n >$n.json
  "$json_get" tokens tile_pairs_available tile_pairs_selected bits_per_byte seconds <$n.json >values
  read -r tokens available selected bits seconds <values
  tiles=$(((n - 1) / 64))
  [ "$tokens" -eq $((n - 1)) ] || fail "$n: $(cat $n.json)"
  [ "$available" -eq $((40 * tiles * (tiles + 1) / 2)) ] || fail "$n: pairs of $tiles tiles: $(cat $n.json)"
  # At least the two recent tiles and the sink of every later tile; at most the budget, the sink and three recent ones.
  [ "$selected" -ge $((40 * (3 * tiles - 3))) ] && [ "$selected" -le $((40 * 516 * tiles)) ] ||
    fail "$n: $(cat $n.json)"
  echo "$n tokens: $bits bits per byte, $seconds s, $selected of $available tile pairs"
done
# The text goes on as it began, and so does the score of one long context; windows score much the same: within 6 % when
# this was written. A state that is lost or mixed up on the way costs bits by the factor.
done_by 1 eval --device cuda --model "$model" --text text --max-tokens 1048576 --context 65536 >windows.json
paste <("$json_get" bits_per_byte <1048576.json) <("$json_get" bits_per_byte <4194304.json) \
  <("$json_get" bits_per_byte <windows.json) >bits
awk '{ exit !($1 > 0 && $2 < 1.25 * $1 && $2 > 0.8 * $1 && $3 < 1.25 * $1 && $3 > 0.8 * $1) }' bits ||
  fail "bits per byte: $(cat bits)"
