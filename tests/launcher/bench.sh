# tessera bench: every mode measures something, with a checkpoint and with weights that are drawn. How fast is not asked.
source "$(dirname "$0")/check.sh"

positive() {
  tr -d '\n' <out | "$json_get" "$@" >values
  awk -F '\t' '{for (i = 1; i <= NF; i++) if (!($i > 0)) exit 1} END {if (!NR) exit 1}' values ||
    fail "not all of $* are above 0: $(cat values)"
}

sed 's/"vocab_size": 256/"vocab_size": 1000/' $model/config.json >config.json
drawn="--config config.json --random-weights 3 --device cpu"
small="--tokens 200 --prefill-chunk 96 --repeat 2"

done_by 1 bench prefill --model $model --device cpu $small >table
grep -q 'prefill of 200 tokens' table || fail "bench prefill: $(cat table)"
for weights in "--model $model --device cpu" "$drawn"; do
  done_by 1 bench prefill $weights $small --json >out
  positive seconds seconds_least seconds_most tokens_per_second device_bytes_used sgemm_tflops
  done_by 1 bench decode $weights --batch 3 --steps 5 --repeat 2 --context 70 --prefill-chunk 64 --json >out
  positive seconds seconds_alone tokens_per_second tokens_per_second_alone gain
  tr -d '\n' <out | "$json_get" batch first_position last_position >values
  grep -qP '^3\t75\t84$' values || fail "bench decode: positions $(cat values)"
done
on_ranks 2 bench decode $drawn --tp 2 --batch 2 --steps 3 --repeat 1 --json >out 2>err || fail "on 2 ranks: $(cat err)"
positive seconds tokens_per_second

tiny="--device cpu --repeat 2 --tokens 256 --batch 3 --hidden 64 --heads 2 --kv-heads 1 --vocabulary 100"
done_by 1 bench kernel $tiny --json >out
positive kernels.{0..20}.seconds kernels.{0..20}.bytes kernels.{0..20}.share_of_copy
tr -d '\n' <out | "$json_get" kernels.{0..20}.op >values
[ "$(cat values)" = "$(printf '"%s"\t' copy embed rms_norm 'linear qkvg' 'linear o' 'linear up' 'linear down' \
  'linear qkvg' 'linear o' 'linear up' 'linear down' 'linear head' swiglu gather_rows tile_importance tile_prune 'attention prefill dense' \
  'attention prefill sparse' 'attention decode' 'attention decode sparse, closing')\"cross_entropy\"" ] || fail "bench kernel: $(cat values)"
tr -d '\n' <out | "$json_get" kernels.17.pairs_selected | grep -q '^[01]\.' || fail "no share of selected pairs"
done_by 1 bench kernel $tiny --op rms_norm >table
grep -q '^rms_norm .*\[256, 64\]' table && ! grep -q '^swiglu' table || fail "bench kernel --op: $(cat table)"
refused 2 'it times the kernels of one device' bench kernel --device cpu
