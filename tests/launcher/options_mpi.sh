# Under the MPI launcher a refusal is said once, by rank 0, and all ranks end in good order.
source "$(dirname "$0")/check.sh"

echo '{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m","prompt":"p"}}' >in
run="run --model $model --input in --output o"
[ "$(on_ranks 2 --help | grep -c '^usage:')" -eq 1 ] || fail "help is printed more than once"
[ "$(on_ranks 2 run --help | grep -c '^usage:')" -eq 1 ] || fail "run --help is printed more than once"
refused 2 '"bogus" is not a command' bogus
refused 2 'nofile: cannot open the input' run --model $model --input nofile --output o --dp 2
refused 3 'tp must divide the 4 KV heads; the grids of 3 ranks that fit are 3 x 1 x 1' $run --tp 3
refused 2 'only tessera run has replicas' eval --model $model --text in --dp 2
refused 2 'nowhere: cannot open' inspect --model nowhere
