import csv
import io

import pytest
from rich.console import Console

from kd_dense.analysis.compare import compare
from kd_dense.analysis.report import csv_text, markdown, print_report, write_report


def printed(comparison, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    print_report(comparison, console)
    return console.file.getvalue()


def test_csv_has_a_line_per_run_and_a_summary(runs):
    lines = list(csv.DictReader(io.StringIO(csv_text(compare(runs, 70.0)))))
    by_run = [line for line in lines if line['row'] == 'run']
    assert [(line['name'], line['seed']) for line in by_run] == [
        (name, str(seed)) for name in ('student', 'LogitKD', 'CWD') for seed in range(5)
    ]
    assert [float(line['difference']) for line in by_run[5:10]] == pytest.approx([2.0, 1.0, 3.0, 2.5, 1.5])
    summary = {line['name']: line for line in lines if line['row'] == 'summary'}
    assert list(summary) == ['student', 'LogitKD', 'CWD', 'teacher']
    logit = summary['LogitKD']
    assert float(logit['value']) == pytest.approx(62.0)
    assert float(logit['interval_low']) == pytest.approx(1.018379, abs=1e-5)
    assert float(logit['interval_high']) == pytest.approx(2.981621, abs=1e-5)
    assert (logit['seeds_won'], float(logit['gap_closed'])) == ('5', pytest.approx(0.2))
    assert (float(logit['time_ratio']), logit['extra_parameters']) == (pytest.approx(1.1), '0')
    assert float(summary['teacher']['value']) == 70.0


def test_markdown_has_scores_seeds_classes_and_the_picture(runs):
    text = markdown(compare(runs, 70.0), 'comparison.png')
    assert '| LogitKD | 62.00 ± 0.71 | +2.00 | [1.02, 2.98] | 5 of 5 | 20 % [10 %, 30 %] | 1.10x (110 s) | 0 |' in text
    assert '| teacher | 70.00 |' in text
    assert '| 2 | 59.00 | 62.00 | +3.00 | 60.00 | +1.00 |' in text
    assert '| pole | 55.00 | 57.00 | +2.00 | [1.02, 2.98] |' in text
    assert '](comparison.png)' in text
    assert 'LogitKD is better by 2.00 mIoU' in text
    for table in text.split('\n\n'):  # every row of a table has as many cells as its head
        if table.startswith('|'):
            assert len({line.count('|') for line in table.splitlines()}) == 1


def test_what_is_not_known_is_na(runs):
    one_seed = {'student': runs['student'][:1], 'distilled': runs['CWD'][:1]}
    for record in (one_seed['student'][0], one_seed['distilled'][0]):
        record.seconds, record.per_class = 0.0, {}
    text = markdown(compare(one_seed))
    assert '| distilled | 61.00 | +1.00 | n/a | 1 of 1 | n/a | n/a | 12,345 |' in text
    assert 'By class' not in text
    assert 'one seed gives no interval' in text


def test_terminal_output_fits_80_columns_and_is_complete(runs):
    text = printed(compare({k: runs[k] for k in ('student', 'LogitKD')}, 70.0), 80)
    assert max(map(len, text.splitlines())) <= 80
    for part in ('student alone', '[1.02, 2.98]', '5 of 5', '[10 %, 30 %]', '1.10x', 'pole', '70.00'):
        assert part in text
    assert 'LogitKD is better by 2.00 mIoU' in ' '.join(text.split())
    assert '…' not in text


def test_names_are_not_markup(runs):
    text = printed(compare({'student': runs['student'], '[red]x|y': runs['LogitKD']}, 70.0), 120)
    assert '[red]x|y is better' in text
    assert '| [red]x\\|y |' in markdown(compare({'student': runs['student'], '[red]x|y': runs['LogitKD']}))


def test_only_the_classes_that_changed_most_are_printed_when_there_are_many(runs):
    for records in runs.values():
        for r in records:
            r.per_class = {f'c{i}': (r.value if i == 33 else 50.0) for i in range(80)}
    text = printed(compare(runs, 70.0), 120)
    assert '24 of 80 classes' in text
    assert 'c33 ' in text
    assert 'c79' not in text
    assert '| c79 |' in markdown(compare(runs, 70.0))


def test_files_are_written(runs, tmp_path):
    files = write_report(compare(runs, 70.0), tmp_path / 'new')
    assert [f.name for f in files] == ['comparison.md', 'comparison.csv']
    assert files[0].read_text(encoding='utf-8').startswith('# Compared with the student alone: mIoU')


def test_the_report_of_an_adaptation_names_its_baseline(adapted):
    comparison = compare(adapted, 70.0)
    text, screen = markdown(comparison), printed(comparison, 80)
    assert text.startswith('# Compared with source only: mIoU in percent')
    assert text.count('| source only |') == 3 and '| target oracle | 70.00 |' in text  # scores, seeds and classes
    assert '(target oracle minus the mean of source only)' in text and 'The target oracle is 10.00 mIoU above' in text
    assert 'Compared with source only' in screen and 'target oracle' in screen
    assert max(map(len, screen.splitlines())) <= 80
    for said in (text, screen):
        assert not any(word in said for word in ('student alone', 'distill', 'teacher'))
