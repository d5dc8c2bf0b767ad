# The embedded model, with its calibration text and prompts; only where the study file says `embedded`.
rule demo_checkpoint:
    output:
        config=f"{RESULTS}/{{model}}/checkpoint/config.json",
        text=f"{RESULTS}/{{model}}/checkpoint/calibration.txt",
        quality=f"{RESULTS}/{{model}}/checkpoint/quality.txt",
        prompts=f"{RESULTS}/{{model}}/checkpoint/prompts.jsonl",
    log:
        f"{RESULTS}/logs/demo_checkpoint/{{model}}.log",
    benchmark:
        f"{RESULTS}/logs/demo_checkpoint/{{model}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    threads: 2
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        out=subpath(output.config, parent=True),
        source=source_hash("model.demo.checkpoint"),
    message:
        "Training the embedded model"
    shell:
        "sparsetrace demo-checkpoint --out {params.out:q} > {log:q} 2>&1"
