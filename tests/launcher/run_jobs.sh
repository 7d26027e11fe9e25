# One job: bad lines among good ones, standard input and output, and the batch it runs in does not matter.
source "$(dirname "$0")/check.sh"
source "$(dirname "$0")/requests.sh"

# ---- I3: the same records whatever the batch, samples of one prompt as copies or not
requests >requests.jsonl
run="run --model $model --threads 1"
done_by 1 $run --input requests.jsonl --output wide.jsonl --cache-memory 200M
done_by 1 $run --input requests.jsonl --output narrow.jsonl --cache-memory 40M --max-batch 1
done_by 1 $run --input requests.jsonl --output middle.jsonl --cache-memory 60M --max-batch 3
records wide.jsonl >wide
[ "$(wc -l <wide)" -eq "$(wc -l <requests.jsonl)" ] || fail "$(wc -l <wide) records"
[ "$(grep -c '"status_code":200' wide)" -eq "$(wc -l <wide)" ] || fail "refused: $(grep -v '"status_code":200' wide)"
for other in narrow middle; do
  records $other.jsonl >$other
  same wide $other "max-batch 16 and $other differ"
done
# The samples of one request are different texts, and log-probabilities come where they were asked for.
"$json_get" custom_id response.body.choices.0.text response.body.choices.1.text <wide.jsonl | grep '^"several"' >two
[ "$(cut -f2 two)" != "$(cut -f3 two)" ] || fail "samples are alike: $(cat two)"
"$json_get" custom_id response.body.choices.3.logprobs.top_logprobs.0 <wide.jsonl | grep -P '^"several"\t\{' >/dev/null ||
  fail "no logprobs"

# ---- Standard input and output
done_by 1 $run --input - --output - --cache-memory 200M <requests.jsonl >piped.jsonl
records piped.jsonl >piped
same wide piped "standard input and output differ from files"
cat requests.jsonl | done_by 1 $run --input - --output - --cache-memory 200M | cat >piped.jsonl
records piped.jsonl >piped
same wide piped "pipes differ from files"

# ---- Nothing to do
done_by 1 $run --input /dev/null --output nothing.jsonl
[ -e nothing.jsonl ] && [ ! -s nothing.jsonl ] || fail "an empty job has records"

# ---- An output that takes nothing
refused 1 '/dev/full: byte 0: cannot write a record' $run --input requests.jsonl --output /dev/full
mkfifo pipe
refused 1 'pipe: is no ordinary file' logits --model "$model" --tokens "$model/golden.safetensors" --output pipe
[ -p pipe ] || fail "the pipe is gone"

# ---- Bad lines
around() { echo "{\"custom_id\":\"$1\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{\"model\":\"m\",$2}}"; }
{
  around good-1 '"prompt":"The","max_tokens":3,"temperature":0'
  echo 'not json'
  around bad-temperature '"prompt":"x","temperature":3'
  echo
  around good-1 '"prompt":"a second time"'
  printf '\xff\xfe\n'
  around bad-field '"prompt":"x","tempature":1'
  around bad-id '"prompt":[1,256]'
  around bad-bias '"prompt":"x","logit_bias":{"999":1}'
  around too-long '"prompt":"x","max_tokens":2000000'
  around all-banned "\"prompt\":\"x\",\"min_tokens\":1,\"stop_token_ids\":[$(seq -s, 1 255)]"
  around nearly-all-banned "\"prompt\":\"x\",\"min_tokens\":1,\"max_tokens\":1,\"stop_token_ids\":[$(seq -s, 1 254)]"
  around no-penalty '"prompt":"xyz","repetition_penalty":1e-44,"max_tokens":2'
  around cold '"prompt":"xyz","temperature":1e-40,"max_tokens":2'
  printf '%s' "$(around good-2 '"prompt":[84,104,101],"max_tokens":3,"temperature":0')" # no end of line
} >mixed.jsonl
done_by 1 $run --input mixed.jsonl --output mixed.out --cache-memory 5M --max-batch 1
"$json_get" custom_id response.status_code response.body.error.code response.body.error.param <mixed.out | sort >got
sort >expected <<'END'
null	400	"invalid_json_line"	null
"bad-temperature"	400	"invalid_value"	"temperature"
"good-1"	400	"duplicate_custom_id"	"custom_id"
null	400	"invalid_utf8"	null
"bad-field"	400	"unknown_parameter"	"tempature"
"bad-id"	400	"invalid_value"	"prompt"
"bad-bias"	400	"invalid_value"	"logit_bias"
"too-long"	400	"context_length_exceeded"	"prompt"
"all-banned"	400	"invalid_value"	"stop_token_ids"
"good-1"	200	-	-
"nearly-all-banned"	200	-	-
"no-penalty"	200	-	-
"cold"	200	-	-
"good-2"	200	-	-
END
same expected got "records of a job with bad lines"
"$json_get" custom_id response.body.choices.0.text <mixed.out >texts
[ "$(grep '^"good-1"' texts | grep -v -- '-$' | cut -f2)" = "$(grep '^"good-2"' texts | cut -f2)" ] || fail "the same prompt as text and as ids"
[ "$("$json_get" response.body.error.message <mixed.out | grep -c '"line [0-9]*: ')" -eq 9 ] || fail "a message has no line"
grep -q '(9 refused)' err || fail "the summary: $(cat err)"

# ---- Show
done_by 1 show --input mixed.jsonl --results mixed.out >shown
grep -q '^--- good-2' shown && grep -q 'refused: line 3: temperature is 3' shown || fail "show: $(cat shown)"
