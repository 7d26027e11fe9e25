# Prints a job of everything that sampling can do, with seeds, over prompts within a tile and over several.
requests() {
  local long='It was the best of times, it was the worst of times, it was the age of wisdom. ' id=0 prompt options
  while IFS='|' read -r prompt options; do
    id=$((id + 1))
    printf '{"custom_id":"%s","method":"POST","url":"/v1/completions","body":{"model":"demo","prompt":"%s",%s}}\n' \
      "$([[ $options == *'"n":4'* ]] && echo several || echo "r$id")" "$prompt" "$options"
  done <<END
Once upon a time|"max_tokens":20,"temperature":0
The old man|"max_tokens":90,"temperature":0
$long$long$long|"max_tokens":20,"temperature":0,"logprobs":3
The sea|"max_tokens":20,"seed":1
A king|"max_tokens":20,"seed":2,"top_p":0.9,"temperature":0.7
My dear|"max_tokens":20,"seed":3,"top_k":5,"frequency_penalty":0.5,"repetition_penalty":1.1
Then|"max_tokens":10,"seed":4,"n":3
$long$long|"max_tokens":20,"seed":5,"n":4,"logprobs":2,"presence_penalty":0.5,"repetition_penalty":1.2
He|"max_tokens":30,"seed":6,"min_p":0.1,"stop":["e ","."]
She|"max_tokens":10,"seed":7,"min_tokens":5,"stop_token_ids":[32,101],"logit_bias":{"101":4}
END
}
