# The program on a GPU: a job in both dtypes, bits that do not depend on the batch, logits of prefill and of decode,
# and memory that is not there.
source "$(dirname "$0")/check.sh"
source "$(dirname "$0")/requests.sh"
compare=$5
needs_gpu

# ---- A job: every request is answered; the same bits whatever the batch (I3); in F32 the CPU's greedy text (I5)
requests >requests.jsonl
cp "$source/configs/demo/requests.jsonl" demo.jsonl
for dtype in f32 bf16; do
  for batch in 1 3 16; do
    done_by 1 run --device cuda --dtype $dtype --model "$model" --input requests.jsonl --output $dtype-$batch.jsonl \
      --max-batch $batch
    records $dtype-$batch.jsonl >$dtype-$batch
    same $dtype-1 $dtype-$batch "$dtype: --max-batch 1 and $batch differ"
  done
  [ "$(grep -c '"status_code":200' $dtype-1)" -eq "$(wc -l <requests.jsonl)" ] || fail "$dtype: $(cat $dtype-1)"
  done_by 1 run --device cuda --dtype $dtype --model "$model" --input demo.jsonl --output demo-$dtype.jsonl
  [ "$(grep -c '"status_code":200' demo-$dtype.jsonl)" -eq "$(grep -c . demo.jsonl)" ] ||
    fail "demo: $(cat demo-$dtype.jsonl)"
done
done_by 1 run --device cpu --model "$model" --input requests.jsonl --output cpu.jsonl --cache-memory 200M
for name in f32-1 cpu; do
  "$json_get" custom_id response.body.choices.0.text <$name.jsonl | grep -P '^"r[123]"' | sort >$name.greedy
done
[ "$(wc -l <cpu.greedy)" -eq 3 ] || fail "greedy records: $(cat cpu.greedy)"
same cpu.greedy f32-1.greedy "greedy text on the CPU and, in F32, on the GPU"

# ---- Logits as a user can check them: prefill, chunks, decode (I1, I2), the CPU (I5)
logits() { done_by 1 logits --model "$model" --tokens "$model/golden.safetensors" --output "$1.safetensors" "${@:2}"; }
logits gpu --device cuda --dtype f32
logits chunks --device cuda --dtype f32 --prefill-chunk 100
logits decode --device cuda --dtype f32 --decode
logits cpu --device cpu
for other in chunks decode cpu; do
  "$compare" gpu.safetensors $other.safetensors || fail "logits of the GPU's prefill and of $other"
done

# ---- Memory that is not there: said before anything begins
refused 1 'cuda: this run needs .* may be planned.*lower --cache-memory' run --device cuda --model "$model" \
  --input requests.jsonl --output no.jsonl --max-batch 65536 --cache-memory 100000G
[ ! -e no.jsonl ] || fail "a refused run left an output"
