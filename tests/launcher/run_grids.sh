# The same job on every grid: bitwise the same records where only replicas are added, the same greedy text where heads
# and vocabulary are shared out.
source "$(dirname "$0")/check.sh"
source "$(dirname "$0")/requests.sh"

requests >requests.jsonl
job() {
  local name=$1 ranks=$2
  shift 2
  done_by "$ranks" run --model "$model" --threads 1 --cache-memory 100M --max-batch 6 \
    --input requests.jsonl --output "$name.jsonl" "$@"
  records "$name.jsonl" >"$name"
  "$json_get" custom_id response.body.choices.0.text <"$name.jsonl" | grep -P '^"r[123]"' | sort >"$name.greedy"
  [ "$(wc -l <"$name.greedy")" -eq 3 ] && [ "$(wc -l <"$name")" -eq 10 ] || fail "$name: records are missing"
}
job one 1
job dp2 2 --dp 2
same one dp2 "two replicas differ from one"
job tp2 2 --tp 2
same one.greedy tp2.greedy "greedy text on two shards"
job tp4 4 # all ranks share the model where nothing is said
same one.greedy tp4.greedy "greedy text on four shards"
job tp2dp2 4 --tp 2 --dp 2
same tp2 tp2dp2 "two replicas of two shards differ from one"
job dp4 4 --dp 4
same one dp4 "four replicas differ from one"
job tp2mpi1 1 --tp 1 --dp 1
same one tp2mpi1 "a grid of one named in full"
