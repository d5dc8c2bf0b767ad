# Step 1: a Hugging Face checkpoint becomes a runtime model.
rule convert:
    input:
        config=lambda wildcards: f"{STUDY.checkpoint(wildcards.model)}/config.json",
        weights=lambda wildcards: STUDY.checkpoint_weights(wildcards.model),
    output:
        f"{RESULTS}/{{model}}/model/config.json",
    log:
        f"{RESULTS}/logs/convert/{{model}}.log",
    benchmark:
        f"{RESULTS}/logs/convert/{{model}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    threads: STUDY.machine.threads
    resources:
        mem_mb=lambda wildcards, attempt: STUDY.needs(
            "convert", wildcards.model, attempt=attempt
        ).mem_mb,
        runtime=lambda wildcards, attempt: STUDY.needs(
            "convert", wildcards.model, attempt=attempt
        ).runtime,
    params:
        checkpoint=subpath(input.config, parent=True),
        out=subpath(output[0], parent=True),
        options=lambda wildcards: options(STUDY.models[wildcards.model].conversion),
        source=source_hash("model.convert"),
    message:
        "Converting {wildcards.model}"
    shell:
        "sparsetrace convert {params.checkpoint:q} --out {params.out:q} --name {wildcards.model:q} {params.options}"
        " > {log:q} 2>&1"
