//! Charts as SVG.

use std::fmt::Display;
use std::path::Path;

use anyhow::{Result, anyhow, ensure};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::report::show_number;

/// One chart: lines through points, x against y.
#[derive(Debug, Clone)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) x: String,
    pub(crate) y: String,
    /// By powers of ten.
    pub(crate) logarithmic: bool,
    pub(crate) lines: Vec<Line>,
}

#[derive(Debug, Clone)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// All charts in one file, two in a row.
pub(crate) fn write(path: &Path, charts: &[Chart]) -> Result<()> {
    ensure!(charts.iter().any(|chart| !chart.lines.is_empty()), "there is nothing to plot");
    let columns = charts.len().min(COLUMNS);
    let rows = charts.len().div_ceil(columns);
    let size = (columns as u32 * CHART_SIZE.0, rows as u32 * CHART_SIZE.1);
    let root = SVGBackend::new(path, size).into_drawing_area();
    let drawn = || -> Result<(), DrawingAreaErrorKind<_>> {
        root.fill(&WHITE)?;
        for (area, chart) in root.split_evenly((rows, columns)).iter().zip(charts) {
            draw(area, chart)?;
        }
        root.present()
    };
    drawn().map_err(|error| failure(path, &error))
}

fn failure(path: &Path, error: &impl Display) -> anyhow::Error {
    anyhow!("cannot write {}: {error}", path.display())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn draw<'a>(area: &Area<'a>, chart: &Chart) -> Drawn<'a> {
    let points = || chart.lines.iter().flat_map(|line| &line.points);
    let y_max = points().map(|(_, y)| *y).fold(f64::MIN_POSITIVE, f64::max) * HEADROOM;
    let x_min = points().map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
    let x_max = points().map(|(x, _)| *x).fold(f64::NEG_INFINITY, f64::max);
    if chart.logarithmic {
        let x_min = x_min.max(f64::MIN_POSITIVE);
        // One point alone has no range.
        draw_on(area, chart, (x_min..x_max.max(x_min * 10.0)).log_scale(), y_max)
    } else {
        draw_on(area, chart, x_min..x_max.max(x_min + 1.0), y_max)
    }
}

fn draw_on<'a, X>(area: &Area<'a>, chart: &Chart, x_range: X, y_max: f64) -> Drawn<'a>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
{
    let mut on = ChartBuilder::on(area)
        .caption(&chart.title, ("sans-serif", 18))
        .margin(12)
        .margin_right(36)
        .x_label_area_size(38)
        .y_label_area_size(64)
        .build_cartesian_2d(x_range, 0.0..y_max)?;
    let number = |value: &f64| show_number(*value);
    on.configure_mesh()
        .x_desc(&chart.x)
        .y_desc(&chart.y)
        .x_label_formatter(&number)
        .y_label_formatter(&number)
        .light_line_style(WHITE)
        .draw()?;
    for (line, colour) in chart.lines.iter().zip(COLOURS.iter().cycle()) {
        let style = colour.stroke_width(2);
        let drawn = on.draw_series(LineSeries::new(line.points.iter().copied(), style).point_size(3))?;
        drawn.label(&line.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    if chart.lines.len() > 1 {
        on.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    }
    Ok(())
}

const COLUMNS: usize = 2;
const CHART_SIZE: (u32, u32) = (560, 340);
const HEADROOM: f64 = 1.1;
const COLOURS: [RGBColor; 4] = [BLUE, RED, GREEN, BLACK];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_have_their_titles_and_a_mark_for_each_point() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("chart.svg");
        let line = |name: &str| Line { name: name.into(), points: vec![(1.0, 3.0), (10.0, 4.0), (100.0, 5.0)] };
        let chart = |title: &str, logarithmic| Chart {
            title: title.into(),
            x: "sites".into(),
            y: "µs".into(),
            logarithmic,
            lines: vec![line("a"), line("b")],
        };
        write(&path, &[chart("first one", true), chart("second one", false), chart("third one", true)]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for part in ["first one", "second one", "third one", "sites", "µs"] {
            assert!(text.contains(part), "{part}");
        }
        assert_eq!(text.matches("<circle").count(), 3 * 2 * 3, "{text}");
        assert!(write(&path, &[]).is_err());
        assert!(write(Path::new("/no/such/directory/x.svg"), &[chart("x", true)]).is_err());
    }
}
