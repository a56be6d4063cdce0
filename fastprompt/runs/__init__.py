"""Run one method on one data set and keep the results in a run directory.

The command line, the demo and the table all run methods through `execute`. A run directory holds

    run.json       the settings (`RunSettings`)
    results.json   the results: trained parameters, history, validation and test record, speed, memory
    best/          the adapter that was best on validation (`PromptedViT.save_pretrained`)
    log.jsonl ...  the files that `fastprompt.fit` writes
"""
