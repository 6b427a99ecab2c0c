"""The command lines of MedicalGPT from 2023 to v2.7, of its launch scripts and notebooks, as flags.

Only what a line asks for is kept, without the launcher: (where it is from, our program, its words).
"""

PEFT = "--target_modules all --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05"
STEPS = "--logging_strategy steps --logging_steps 10 --eval_steps 50 --save_steps 500 --save_strategy steps"
OLD_TAIL = (
    f"--overwrite_output_dir --ddp_timeout 30000 --logging_first_step True {PEFT} --torch_dtype float16 "
    "--device_map auto --report_to tensorboard --ddp_find_unused_parameters False --gradient_checkpointing True"
)
NEW_TAIL = (
    f"--ddp_timeout 30000 --logging_first_step True {PEFT} --torch_dtype bfloat16 --bf16 --report_to tensorboard "
    "--ddp_find_unused_parameters False --gradient_checkpointing True"
)
PAIRS_TAIL = f"{PEFT} --report_to tensorboard --remove_unused_columns False --gradient_checkpointing True"
BOTH = "--do_train --do_eval --use_peft True"
BATCH = "--per_device_train_batch_size 4 --per_device_eval_batch_size 4"
RUN_RL = (
    "--torch_dtype float16 --device_map auto --train_file_dir D --validation_file_dir V --batch_size 8 "
    "--max_source_length 256 --max_target_length 256 --max_train_samples 1000 --use_peft True --lora_rank 8 "
    "--lora_alpha 16 --lora_dropout 0.05 --do_train --max_steps 100 --learning_rate 1e-5 --save_steps 50 "
    "--output_dir O --early_stopping True --target_kl 0.1 --reward_baseline 0.0"
)
GRPO_TAIL = (
    "--report_to tensorboard --remove_unused_columns False --beta 0.001 --learning_rate 5.0e-7 "
    "--lr_scheduler_type cosine --warmup_ratio 0.03 --use_vllm False"
)

LINES: tuple[tuple[str, str, str], ...] = (
    (
        "2023 run_pt.sh",
        "pretraining.py",
        f"--model_type bloom --model_name_or_path M --train_file_dir D --validation_file_dir V {BATCH} {BOTH} "
        "--seed 42 --fp16 --max_train_samples 10000 --max_eval_samples 10 --num_train_epochs 0.5 --learning_rate 2e-4 "
        f"--warmup_ratio 0.05 --weight_decay 0.01 {STEPS} --evaluation_strategy steps --save_total_limit 3 "
        f"--gradient_accumulation_steps 1 --preprocessing_num_workers 1 --block_size 1024 --output_dir O {OLD_TAIL}",
    ),
    (
        "2023 run_pt.sh with a dataset of the hub",
        "pretraining.py",
        "--model_type llama --model_name_or_path M --dataset_name shibing624/medical --dataset_config_name finetune "
        "--validation_split_percentage 0.001 --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --do_train "
        "--do_eval --seed 42 --fp16 --max_train_samples 100000 --max_eval_samples 10 --num_train_epochs 1 "
        f"--learning_rate 2e-4 --warmup_ratio 0.05 --weight_decay 0.01 {STEPS} --evaluation_strategy steps "
        f"--save_total_limit 3 --gradient_accumulation_steps 1 --preprocessing_num_workers 1 --block_size 1024 "
        f"--output_dir O {OLD_TAIL}",
    ),
    (
        "2024 run_training_ppo_pipeline.ipynb, stage 1",
        "pretraining.py",
        "--model_type bloom --model_name_or_path M --train_file_dir D --validation_file_dir V "
        f"--per_device_train_batch_size 3 --per_device_eval_batch_size 3 {BOTH} --seed 42 --fp16 "
        "--max_train_samples 20000 --max_eval_samples 10 --num_train_epochs 1 --learning_rate 2e-4 --warmup_ratio 0.05 "
        f"--weight_decay 0.01 {STEPS} --evaluation_strategy steps --save_total_limit 3 --gradient_accumulation_steps 1 "
        f"--preprocessing_num_workers 1 --block_size 128 --group_by_length True --output_dir O {OLD_TAIL}",
    ),
    (
        "2025 run_pt.sh",
        "pretraining.py",
        f"--model_name_or_path M --train_file_dir D --validation_file_dir V {BATCH} {BOTH} --seed 42 "
        "--max_train_samples 10000 --max_eval_samples 10 --num_train_epochs 0.5 --learning_rate 2e-4 "
        f"--warmup_ratio 0.05 --weight_decay 0.01 {STEPS} --eval_strategy steps --save_total_limit 13 "
        "--gradient_accumulation_steps 8 --preprocessing_num_workers 10 --block_size 512 --packing True --output_dir O "
        f"--overwrite_output_dir --device_map auto {NEW_TAIL} --cache_dir C",
    ),
    (
        "2023 run_sft.sh",
        "supervised_finetuning.py",
        f"--model_type bloom --model_name_or_path M --train_file_dir D --validation_file_dir V {BATCH} {BOTH} --fp16 "
        "--max_train_samples 1000 --max_eval_samples 10 --num_train_epochs 1 --learning_rate 2e-5 --warmup_ratio 0.05 "
        f"--weight_decay 0.05 {STEPS} --evaluation_strategy steps --save_total_limit 3 --gradient_accumulation_steps 1 "
        f"--preprocessing_num_workers 1 --max_source_length 256 --max_target_length 256 --output_dir O {OLD_TAIL}",
    ),
    (
        "2024 run_sft.sh",
        "supervised_finetuning.py",
        f"--model_type auto --model_name_or_path M --train_file_dir D --validation_file_dir V {BATCH} {BOTH} "
        "--template_name qwen --max_train_samples 1000 --max_eval_samples 10 --model_max_length 1024 "
        f"--num_train_epochs 1 --learning_rate 2e-5 --warmup_ratio 0.05 --weight_decay 0.05 {STEPS} "
        "--evaluation_strategy steps --save_total_limit 13 --gradient_accumulation_steps 1 "
        f"--preprocessing_num_workers 4 --output_dir O --fp16 {OLD_TAIL} --cache_dir C",
    ),
    (
        "2025 run_sft.sh",
        "supervised_finetuning.py",
        f"--model_name_or_path M --train_file_dir D --validation_file_dir V {BATCH} {BOTH} --template_name qwen "
        "--max_train_samples 1000 --max_eval_samples 10 --model_max_length 4096 --num_train_epochs 1 "
        f"--learning_rate 2e-5 --warmup_steps 50 --weight_decay 0.05 {STEPS} --eval_strategy steps "
        "--save_total_limit 13 --gradient_accumulation_steps 8 --preprocessing_num_workers 4 --output_dir O "
        f"{NEW_TAIL} --cache_dir C --flash_attn True",
    ),
    (
        "2024 run_full_sft.sh",
        "supervised_finetuning.py",
        "--model_name_or_path M --train_file_dir D --validation_file_dir V --cache_dir C --device_map None "
        "--use_peft False --per_device_train_batch_size 2 --do_train --num_train_epochs 3 "
        "--per_device_eval_batch_size 2 --max_train_samples -1 --learning_rate 3e-5 --warmup_ratio 0.2 "
        "--model_max_length 2048 --weight_decay 0.01 --logging_strategy steps --logging_steps 1 --save_steps 400 "
        "--save_strategy steps --save_total_limit 3 --gradient_accumulation_steps 1 --preprocessing_num_workers 128 "
        "--output_dir O --overwrite_output_dir --ddp_timeout 30000 --logging_first_step True --target_modules all "
        "--torch_dtype bfloat16 --report_to tensorboard --neft_alpha 8 --ddp_find_unused_parameters False "
        "--gradient_checkpointing True --template_name chatglm3 --deepspeed zero2.json --fp16",
    ),
    (
        "v2.7 run_sft_accelerate.sh",
        "supervised_finetuning.py",
        "--model_name_or_path M --train_file_dir D --validation_file_dir V --per_device_train_batch_size 2 "
        f"--per_device_eval_batch_size 2 {BOTH} --max_train_samples 1000 --max_eval_samples 100 "
        f"--model_max_length 512 --num_train_epochs 1 --learning_rate 2e-5 --warmup_steps 5 --weight_decay 0.05 "
        f"{STEPS} --eval_strategy steps --save_total_limit 13 --gradient_accumulation_steps 8 "
        f"--preprocessing_num_workers 4 --output_dir O {NEW_TAIL} --cache_dir C --flash_attn True",
    ),
    (
        "v2.7 run_agent_sft.sh",
        "supervised_finetuning.py",
        "--model_name_or_path M --train_file_dir D --validation_file_dir V --per_device_train_batch_size 2 "
        f"--per_device_eval_batch_size 1 {BOTH} --max_train_samples 1000 --max_eval_samples 10 --model_max_length 2048 "
        f"--num_train_epochs 3 --learning_rate 2e-5 --warmup_steps 10 --weight_decay 0.05 {STEPS} "
        "--eval_strategy steps --save_total_limit 3 --gradient_accumulation_steps 8 --preprocessing_num_workers 4 "
        f"--output_dir O {NEW_TAIL} --tool_format default --cache_dir C",
    ),
    (
        "2023 run_rm.sh",
        "reward_modeling.py",
        f"--model_type bloom --model_name_or_path M --train_file_dir D --validation_file_dir V {BATCH} --do_train "
        "--use_peft True --seed 42 --max_train_samples 1000 --max_eval_samples 10 --num_train_epochs 1 "
        "--learning_rate 2e-5 --warmup_ratio 0.05 --weight_decay 0.001 --logging_strategy steps --logging_steps 10 "
        "--evaluation_strategy no --save_steps 500 --save_strategy steps --save_total_limit 3 --max_source_length 256 "
        f"--max_target_length 256 --output_dir O {OLD_TAIL}",
    ),
    (
        "2024 run_rm.sh and run_training_ppo_pipeline.ipynb, stage 3",
        "reward_modeling.py",
        f"--model_type auto --model_name_or_path M --train_file_dir D --validation_file_dir V {BATCH} --do_train "
        "--use_peft True --seed 42 --max_train_samples 1000 --max_eval_samples 10 --num_train_epochs 1 "
        f"--learning_rate 2e-5 --warmup_ratio 0.05 --weight_decay 0.001 {STEPS} --evaluation_strategy steps "
        "--save_total_limit 3 --max_source_length 256 --max_target_length 256 --output_dir O --overwrite_output_dir "
        f"--ddp_timeout 30000 --logging_first_step True --torch_dtype float32 --device_map auto "
        f"--ddp_find_unused_parameters False {PAIRS_TAIL}",
    ),
    (
        "2023 run_rl.sh",
        "ppo_training.py",
        f"--model_type bloom --model_name_or_path M --reward_model_name_or_path R {RUN_RL}",
    ),
    (
        "2024 run_ppo.sh",
        "ppo_training.py",
        f"--model_type auto --model_name_or_path M --reward_model_name_or_path R --template_name qwen {RUN_RL}",
    ),
    (
        "2025 run_ppo.sh",
        "ppo_training.py",
        "--sft_model_path M --reward_model_path R --template_name qwen --torch_dtype bfloat16 --train_file_dir D "
        "--validation_file_dir V --max_source_length 1024 --response_length 1000 --per_device_train_batch_size 1 "
        "--gradient_accumulation_steps 4 --gradient_checkpointing True --do_train --total_episodes 30000 "
        "--output_dir O --missing_eos_penalty 1.0 --eval_strategy steps --eval_steps 100 --report_to tensorboard",
    ),
    (
        "v2.7 run_ppo.sh",
        "ppo_training.py",
        "--sft_model_path M --reward_model_path R --model_name_or_path M --template_name qwen3_5 --dtype bfloat16 "
        "--train_file_dir D --validation_file_dir V --max_source_length 1024 --max_completion_length 1000 "
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 4 --gradient_checkpointing True --do_train "
        "--max_steps 3000 --output_dir O --eval_strategy steps --eval_steps 100 --num_train_epochs 3 "
        "--report_to tensorboard",
    ),
    (
        "2024 run_dpo.sh",
        "dpo_training.py",
        "--model_type auto --model_name_or_path M --template_name qwen --train_file_dir D --validation_file_dir V "
        f"--per_device_train_batch_size 4 --per_device_eval_batch_size 1 {BOTH} --max_train_samples 1000 "
        "--max_eval_samples 10 --max_steps 100 --eval_steps 20 --save_steps 50 --max_source_length 1028 "
        f"--max_target_length 1028 --output_dir O --torch_dtype float16 --fp16 True --device_map auto {PAIRS_TAIL} "
        "--cache_dir C",
    ),
    (
        "v2.7 run_dpo.sh and run_training_dpo_pipeline.ipynb, stage 3",
        "dpo_training.py",
        "--model_name_or_path M --template_name qwen3_5 --train_file_dir D --validation_file_dir V "
        f"--per_device_train_batch_size 4 --gradient_accumulation_steps 8 --per_device_eval_batch_size 1 {BOTH} "
        "--max_train_samples 1000 --max_eval_samples 10 --max_steps 100 --eval_steps 20 --save_steps 50 "
        "--max_source_length 1024 --max_target_length 512 --output_dir O --torch_dtype bfloat16 --bf16 True "
        f"--fp16 False --device_map auto {PAIRS_TAIL} --cache_dir C",
    ),
    (
        "v2.7 run_agent_dpo.sh",
        "dpo_training.py",
        "--model_name_or_path M --train_file_dir D --validation_file_dir V --per_device_train_batch_size 4 "
        f"--gradient_accumulation_steps 8 --per_device_eval_batch_size 1 {BOTH} --max_train_samples 1000 "
        "--max_eval_samples 10 --max_steps 100 --eval_steps 20 --save_steps 50 --max_source_length 1024 "
        "--max_target_length 512 --output_dir O --torch_dtype bfloat16 --bf16 True --fp16 False "
        f"--tool_format default {PAIRS_TAIL} --cache_dir C",
    ),
    (
        "2024 run_orpo.sh",
        "orpo_training.py",
        "--model_type auto --model_name_or_path M --template_name qwen --train_file_dir D --validation_file_dir V "
        f"--per_device_train_batch_size 4 --per_device_eval_batch_size 1 {BOTH} --max_train_samples 1000 "
        "--max_eval_samples 50 --max_steps 100 --eval_steps 20 --save_steps 50 --max_source_length 2028 "
        f"--max_target_length 1028 --output_dir O --torch_dtype float16 --fp16 True --device_map auto {PAIRS_TAIL} "
        "--orpo_beta 0.1 --cache_dir C",
    ),
    (
        "2025 run_orpo.sh",
        "orpo_training.py",
        "--model_name_or_path M --template_name qwen --train_file_dir D --per_device_train_batch_size 2 "
        f"--per_device_eval_batch_size 2 --gradient_accumulation_steps 8 {BOTH} --max_train_samples 1000 "
        "--max_eval_samples 50 --max_steps 100 --eval_steps 20 --save_steps 50 --max_source_length 1024 "
        f"--max_target_length 512 --output_dir O --torch_dtype float16 --bf16 True {PAIRS_TAIL} --orpo_beta 0.1 "
        "--cache_dir C",
    ),
    (
        "2025 run_grpo.sh",
        "grpo_training.py",
        "--model_name_or_path M --dataset_name xiaodongguaAIGC/X-R1-750 --train_samples -1 "
        "--per_device_train_batch_size 1 --max_steps -1 --num_train_epochs 1 --save_steps 50 --save_strategy steps "
        "--num_generations 6 --max_prompt_length 512 --max_completion_length 512 --output_dir O --torch_dtype bfloat16 "
        f"--bf16 True --gradient_accumulation_steps 2 --gradient_checkpointing True {GRPO_TAIL} --logging_steps 10",
    ),
    (
        "2025 run_grpo_multigpu.sh",
        "grpo_training.py",
        "--model_name_or_path M --dataset_name openai/gsm8k --train_samples -1 --per_device_train_batch_size 1 "
        "--max_steps 1000 --save_steps 100 --save_strategy steps --num_generations 6 --max_prompt_length 512 "
        "--max_completion_length 1012 --output_dir O --torch_dtype bfloat16 --bf16 True "
        f"--gradient_accumulation_steps 8 --gradient_checkpointing True --push_to_hub False {GRPO_TAIL}",
    ),
    (
        "2025 run_grpo.sh with QLoRA",
        "grpo_training.py",
        "--model_name_or_path M --train_file_dir D --train_samples -1 --max_steps -1 --num_train_epochs 1 "
        "--save_steps 50 --save_strategy steps --save_total_limit 13 --output_dir O --torch_dtype bfloat16 --bf16 True "
        f"--gradient_checkpointing False {GRPO_TAIL} --logging_steps 10 --use_peft True --qlora True "
        "--load_in_4bit True --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj --lora_r 16 "
        "--lora_alpha 32 --lora_dropout 0.1 --per_device_train_batch_size 4 --per_device_eval_batch_size 1 "
        "--num_generations 4 --gradient_accumulation_steps 1 --max_prompt_length 16384 --max_completion_length 512",
    ),
    (
        "v2.7 run_grpo.sh",
        "grpo_training.py",
        "--model_name_or_path M --train_file_dir D --train_samples -1 --max_steps -1 --num_train_epochs 1 "
        "--save_steps 50 --save_strategy steps --save_total_limit 13 --output_dir O --dtype bfloat16 --bf16 True "
        f"--gradient_checkpointing False {GRPO_TAIL} --logging_steps 10 --use_peft True --qlora False "
        "--load_in_4bit False --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj "
        "--lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --per_device_train_batch_size 4 "
        "--per_device_eval_batch_size 1 --num_generations 4 --gradient_accumulation_steps 1 "
        "--max_completion_length 512",
    ),
    ("2023 inference.py", "inference.py", "--base_model M --lora_model L --with_prompt --interactive"),
    (
        "2023 inference.py with a file",
        "inference.py",
        "--base_model M --tokenizer_path T --data_file F --with_prompt --predictions_file P --gpus 0 --only_cpu",
    ),
    ("2023 notebook", "inference.py", "--model_type bloom --base_model M --with_prompt --interactive"),
    (
        "2024 infer.sh",
        "inference.py",
        "--model_type chatglm --base_model M --tokenizer_path T --lora_model L --interactive",
    ),
    (
        "2024 inference_multigpu_demo.py",
        "inference.py",
        "--model_type auto --base_model M --lora_model L --tokenizer_path T --template_name qwen "
        "--repetition_penalty 1.0 --temperature 0.7 --max_new_tokens 128 --batch_size 4 --data_file F --output_file P "
        "--resize_emb --load_in_4bit",
    ),
    (
        "v2.7 inference.py",
        "inference.py",
        "--base_model M --lora_model L --system_prompt S --stop_str X --repetition_penalty 1.0 --max_new_tokens 512 "
        "--data_file F --temperature 0.7 --output_file P --eval_batch_size 4 --resize_emb --load_in_8bit",
    ),
    (
        "2023 merge_peft_adapter.py",
        "merge_peft_adapter.py",
        "--model_type bloom --base_model_name_or_path M --peft_model_path L --output_dir O",
    ),
    (
        "v2.7 merge_peft_adapter.py",
        "merge_peft_adapter.py",
        "--base_model M --tokenizer_path T --lora_model L --resize_emb --output_dir O",
    ),
    (
        "2024 gradio_demo.py",
        "gradio_demo.py",
        "--model_type auto --base_model M --lora_model L --tokenizer_path T --template_name qwen --only_cpu "
        "--resize_emb --share --port 8081",
    ),
    (
        "2024 fastapi_server_demo.py",
        "fastapi_server_demo.py",
        "--model_type auto --base_model M --lora_model L --tokenizer_path T --template_name qwen "
        "--repetition_penalty 1.0 --max_new_tokens 512 --resize_emb --gpus 0 --only_cpu --port 8008",
    ),
    (
        "v2.7 openai_api.py",
        "openai_api.py",
        "--base_model M --lora_model L --template_name qwen --api_auth user:password --cpu_only --server_port 8000 "
        "--server_name 127.0.0.1 --disable_gc",
    ),
    (
        "2024 chatpdf.py",
        "chatpdf.py",
        "--sim_model E --gen_model_type auto --gen_model M --lora_model L --corpus_files a.txt,b.pdf --device cuda "
        "--int4 --chunk_size 100 --chunk_overlap 5 --num_expand_context_chunk 1",
    ),
    (
        "v2.7 chatpdf.py",
        "chatpdf.py",
        "--sim_model E --gen_model M --prompt_template_name qwen --lora_model L --corpus_files a.txt --device cpu "
        "--int8 --chunk_size 100 --chunk_overlap 5",
    ),
    ("v2.7 validate_jsonl.py", "validate_jsonl.py", "--file_path F"),
    (
        "v2.7 convert_dataset.py",
        "convert_dataset.py",
        "--in_file M --out_file out.jsonl --data_type qa --file_type csv",
    ),
)
