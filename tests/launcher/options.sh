# Help, and what the program says when it is asked for what it cannot do.
source "$(dirname "$0")/check.sh"

done_by 1 --help >help
for command in run eval logits inspect show bench; do
  grep -q "^  $command " help || fail "--help does not name $command"
  done_by 1 $command --help >help-$command
  grep -q "^usage: tessera $command" help-$command || fail "$command --help has no usage"
  grep -q '^example:' help-$command || fail "$command --help has no example"
  # Every option that its table of options could print is one that it takes.
  for option in $(grep -o '^  --[a-z-]*' help-$command); do
    "$tessera" $command "$option" </dev/null 2>err >/dev/null || true
    if grep -q 'is not an option' err; then fail "$command --help names $option, which is not an option"; fi
  done
done
"$tessera" | cmp -s - help || fail "without a command the help is not printed"
done_by 1 --version | grep -q '^tessera [0-9]' || fail "--version"

echo '{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m","prompt":"p"}}' >in
run="run --model $model --input in --output o"
refused 1 '"bogus" is not a command; there are run, eval, logits, inspect, show and bench' bogus
for command in run eval logits inspect show bench; do
  refused 1 "$command: \"--bogus\" is not an option; see tessera $command --help" $command --bogus
done
refused 1 '"-x" is not an option' run -x
refused 1 '"-x" is not an option' run -xy
refused 1 'option "--model" needs a value' run --model
refused 1 '"--json=1": the option takes no value' inspect --json=1
refused 1 '"stray" stands alone' run stray
refused 1 '--input FILE is missing' run
refused 1 '--output FILE is missing' run --input in
refused 1 '--model DIR is missing' run --input in --output o
refused 1 'nowhere: cannot open: .*; the directory of a model is needed' run --model nowhere --input in --output o
mkdir empty
refused 1 'empty/config.json' run --model empty --input in --output o
refused 1 'nofile: cannot open the input.*give a file' run --model $model --input nofile --output o
refused 1 'cannot open the output.*give a file in a directory that exists' run --model $model --input in --output no/o
refused 1 'same file as the input' run --model $model --input in --output in
refused 1 '--max-batch is "0"; a whole number from 1 to 65536 is allowed' $run --max-batch 0
refused 1 '--max-batch is "4x"' $run --max-batch 4x
refused 1 '--threads is ""' $run --threads ''
refused 1 '--tp is "-1"' $run --tp -1
refused 1 '--prefill-chunk is "0"' $run --prefill-chunk 0
refused 1 '--cache-memory is "1T"; .*K, M or G' $run --cache-memory 1T
refused 1 '--cache-memory is "9000000000000000000G"' $run --cache-memory 9000000000000000000G
refused 1 'at most 0 sequences fit' $run --cache-memory 1K
refused 1 'may be planned: lower --cache-memory' $run --device cpu --max-batch 65536 --cache-memory 100000G
refused 1 'this build has: cpu' $run --device tpu
refused 1 'f32 or, on cuda, bf16 are allowed' $run --dtype f64
refused 1 'f32, bf16 or fp8 are allowed' $run --cache-dtype f16
refused 1 'device cpu computes in: f32' $run --device cpu --dtype bf16
refused 1 'device cpu has none of those' $run --device cpu --cuda-kernels sm_80
refused 1 'start a multiple of 2 ranks' $run --tp 2
refused 1 'eval: --text FILE is missing' eval --model $model
refused 1 'nofile: cannot open the text' eval --model $model --text nofile
refused 1 '0 tokens; 2 or more can be scored' eval --model $model --text /dev/null
refused 1 'only tessera run has replicas' eval --model $model --text in --dp 2
refused 1 'logits: --tokens FILE is missing' logits --model $model
refused 1 'Is this a safetensors file' logits --model $model --tokens in --output l
echo '[1, 2, 256]' >ids
refused 1 'token 2 is 256; the model.s vocabulary is 0 to 255' logits --model $model --tokens ids --output l
echo '[1, 2.5]' >ids
refused 1 'entry 1 is not a token id' logits --model $model --tokens ids --output l
[ ! -e l ] || fail "refused logits left a file"
refused 1 'bench prefill, bench decode or bench kernel' bench
refused 1 'bench: "stray" stands alone' bench stray
refused 1 '--model DIR is missing' bench decode
refused 1 'given together' bench decode --config $model
refused 1 'given together' bench decode --model $model --random-weights 1
refused 1 'one of the two is allowed' bench prefill --model $model --config $model --random-weights 1
refused 1 '--random-weights is "x"; a whole number' bench prefill --config $model --random-weights x
refused 1 '--op is "bogus"; embed, rms_norm, linear, swiglu, gather_rows, tile_importance, tile_prune, attention, cross_entropy and sample are allowed' bench kernel --op bogus
refused 1 '--kv-heads is "3"; a divisor of --heads' bench kernel --heads 4 --kv-heads 3
refused 1 '--head-dim is "96"; 64 or 128 are allowed' bench kernel --head-dim 96
refused 1 'inspect: --model DIR is missing' inspect
refused 1 'nowhere: cannot open' inspect --model nowhere
refused 1 'are needed' show --input in
refused 1 'nofile: cannot open it' show --input nofile --results nofile
[ ! -e o ] || fail "a refused run left an output"

code=0
"$tessera" inspect --model $model >/dev/full 2>err || code=$?
[ $code -eq 1 ] && grep -q 'standard output cannot be written' err || fail "a full disk behind standard output: $code"

done_by 1 inspect --model $model >table
grep -q '10 of hidden size 256' table || fail "inspect: $(cat table)"
done_by 1 inspect --model $model --json | tr -d '\n' |
  "$json_get" vocab_size hidden_size num_hidden_layers head_dim tile_sparsity.cache_tiles parameters >values
grep -qP '^256\t256\t10\t64\t512\t8' values || fail "inspect --json: $(cat values)"
# Ten layers of four KV heads: the open tile, its gates and c, the query sum, E, S^, z^, pairs and tiles held.
rest=$((64 * 8 + 64 * 4 + 8 + 64 * 4 + 16 + 4))
for memory in "f32 $((40 * (3 * 64 * 64 * 4 + rest)))" "bf16 $((40 * (3 * 64 * 64 * 2 + 64 * 4 + rest)))"; do
  done_by 1 inspect --model $model --dtype ${memory% *} --json | tr -d '\n' | "$json_get" sequence_bytes >values
  grep -qx ${memory#* } values || fail "inspect --dtype ${memory% *}: $(cat values), expected ${memory#* }"
done
