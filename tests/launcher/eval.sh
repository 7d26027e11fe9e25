# The score of a text: fields, windows, chunks and shards.
source "$(dirname "$0")/check.sh"

for i in 1 2 3 4 5 6 7 8; do echo "It was the best of times, it was the worst of times, it was chapter $i of a long book."; done >text
eval_to() {
  local name=$1 ranks=$2
  shift 2
  done_by "$ranks" eval --model "$model" "$@" >"$name.json"
  [ "$(wc -l <"$name.json")" -eq 1 ] || fail "$name: $(cat "$name.json")"
  "$json_get" tokens tile_pairs_available tile_pairs_selected <"$name.json" >"$name.counts"
  "$json_get" nats bits_per_byte perplexity seconds <"$name.json" >"$name.score"
}
# close A B: scores that are equal but for rounding.
close() {
  paste "$1.score" "$2.score" |
    awk '{ for (i = 1; i <= 3; i++) { d = $i - $(i + 4); if (d < 0) d = -d; if (!($i > 0) || d > 1e-5 * $i) exit 1 } }' ||
    fail "scores $1 and $2: $(cat "$1.json" "$2.json")"
}
n=$(wc -c <text)
eval_to one 1 --text text
[ "$(cut -f1 one.counts)" -eq $((n - 1)) ] || fail "tokens: $(cat one.json) of $n bytes"
# ten tiles or more: every query tile may see those before it, in 10 layers of 4 heads
tiles=$(((n - 1) / 64))
[ "$(cut -f2 one.counts)" -gt 0 ] && [ "$(cut -f3 one.counts)" -gt 0 ] &&
  [ "$(cut -f3 one.counts)" -le "$(cut -f2 one.counts)" ] || fail "pairs: $(cat one.json)"
[ "$(cut -f2 one.counts)" -eq $((40 * tiles * (tiles + 1) / 2)) ] || fail "pairs of $tiles tiles: $(cat one.json)"
awk '{ exit !($2 > 0.5 && $2 < 6 && ($3 / 2 ^ $2 - 1) ^ 2 < 1e-12) }' one.score || fail "the score: $(cat one.json)"

eval_to shards 2 --text text
same one.counts shards.counts "pairs over two shards"
close one shards
eval_to chunks 1 --text text --prefill-chunk 33
same one.counts chunks.counts "pairs by chunks"
close one chunks
eval_to stdin 1 --text - <text
close one stdin
eval_to stdin2 2 --text - <text
close one stdin2

eval_to short 1 --text text --max-tokens 100
[ "$(cut -f1 short.counts)" -eq 99 ] || fail "--max-tokens: $(cat short.json)"
eval_to windows 1 --text text --context 100
[ "$(cut -f1 windows.counts)" -eq $((n - 1)) ] || fail "--context: every token but the first is scored: $(cat windows.json)"
eval_to window 1 --text text --context 1M
close one window
